"""Convolutions side by side against one after the other."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import cast_together, use_backend
from lgcnet_fast.ops.conv3_kernels import conv3_weight_gradients
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.pointwise_kernels import (
    convolution_gradient,
    pointwise_convolution_backward,
)

GEOMETRIES = [Geometry(1, 1), Geometry(2, 1), Geometry(1, 2, 2), Geometry()]
SHAPES = [((2, 3, 5, 6), (4, 3, 3, 3)), ((1, 3, 7, 6), (2, 3, 3, 3))]
SHAPES += [((2, 2, 5, 5), (3, 2, 3, 3)), ((2, 4, 1, 1), (5, 4, 1, 1))]


def operands(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Maps in NHWC memory, then weights."""
    torch.manual_seed(0)
    shapes = [*(x for x, _ in SHAPES), *(weight for _, weight in SHAPES)]
    leaves = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in leaves]


def outcome(leaves: list[Tensor], backend: str, autocast: bool = False) -> list[Tensor]:
    count, device = len(GEOMETRIES), leaves[0].device.type
    with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
        maps = convolutions(leaves[:count], leaves[count:], GEOMETRIES)
    torch.manual_seed(1)
    g = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in maps]
    return [*maps, *torch.autograd.grad(maps, leaves, g)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_side_by_side_is_one_after_the_other(
    backend: str, autocast: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgcnet_fast.ops.backend.why_not", lambda *arguments: None)
    leaves = operands(device)
    reference, fused = (outcome(leaves, name, autocast) for name in ("reference", backend))
    for found, wanted in zip(fused, reference, strict=True):
        assert found.dtype == wanted.dtype
        # Both round to bfloat16, and may round a sum to different sides.
        steps = {"rtol": 2**-7, "atol": 2**-7} if autocast else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found, wanted, **steps)


@pytest.mark.parametrize("served", [False, True])
def test_gradients_of_a_pointwise_convolution(
    served: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lgcnet_fast.kernels.pointwise_backward.serves", lambda x, out_channels: served
    )
    torch.manual_seed(0)
    g, x, weight = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for shape in ((2, 5, 3, 17), (2, 5, 3, 16), (17, 16, 1, 1))
    )
    g, x = g.movedim(-1, 1), x.movedim(-1, 1)
    before = x.clone()
    dx, dw = pointwise_convolution_backward(g, x, weight)
    assert torch.equal(x, before) and dx.stride() == x.stride()
    assert dx.dtype == x.dtype and (dw.dtype, dw.stride()) == (weight.dtype, weight.stride())
    for found, equation, other in ((dx, "nohw,oc->nchw", weight[..., 0, 0]), (dw, TO_DW, x)):
        wanted = torch.einsum(equation, g.double(), other.double()).view(found.shape)
        torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-5)
    torch.library.opcheck(pointwise_convolution_backward, (g, x, weight))


TO_DW = "nohw,nchw->oc"


@pytest.mark.parametrize("served", [False, True])
def test_weight_gradients_of_3x3_convolutions(
    served: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgcnet_fast.kernels.conv3.serves", lambda x, out_channels: served)
    torch.manual_seed(0)
    gs, xs, weights = (
        [torch.randn(shape, device=device, dtype=torch.bfloat16).movedim(-1, 1) for _ in range(2)]
        for shape in ((2, 5, 3, 32), (2, 5, 3, 32), (32, 3, 3, 32))
    )
    dw = conv3_weight_gradients(gs, xs, weights, "triton")
    assert dw.dtype == weights[0].dtype
    for found, g, x in zip(dw, gs, xs, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last)
        wanted = torch.nn.grad.conv2d_weight(x.double(), found.shape, g.double(), padding=1)
        torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-5)
    torch.library.opcheck(conv3_weight_gradients, (gs, xs, weights, "triton"))


def test_3x3_convolutions_of_equal_and_of_other_shapes(device: torch.device) -> None:
    """Two that go together, one of another size, one of stride 2, a 1x1 one, and of other channels,
    few and many."""
    geometries = [Geometry(1, 1), Geometry(2, 1), Geometry(), *[Geometry(1, 1)] * 4]
    sizes, kernels = [*[(3, 5)] * 4, (4, 3), (3, 5), (3, 5)], [3, 3, 1, 3, 3, 3, 3]
    channels, count = [32, 32, 32, 32, 32, 16, 96], len(geometries)
    torch.manual_seed(0)
    shapes = [(2, own, *size) for own, size in zip(channels, sizes, strict=True)]
    shapes += [(32, own, k, k) for own, k in zip(channels, kernels, strict=True)]
    leaves = [
        torch.randn(shape, device=device)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for shape in shapes
    ]

    def outcome(backend: str) -> tuple[Tensor, ...]:
        with use_backend(backend):
            maps = convolutions(leaves[:count], leaves[count:], geometries)
        torch.manual_seed(1)
        gs = [torch.randn_like(y) for y in maps]
        return *torch.autograd.grad(maps, leaves, gs), *maps

    for found, wanted in zip(outcome("triton"), outcome("reference"), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-3)


def test_3x3_convolutions_of_stride_2(device: torch.device) -> None:
    """One that kernels take, one of too odd channels, and a map that needs no gradient."""
    torch.manual_seed(0)
    shapes = [(2, 8, 5, 6), (2, 8, 4, 3), (2, 16, 3, 2), (16, 8, 3, 3), (9, 8, 3, 3), (8, 16, 3, 3)]
    leaves = [
        torch.randn(shape, device=device)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(index != 2)
        for index, shape in enumerate(shapes)
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def outcome(backend: str) -> list[Tensor]:
        with use_backend(backend):
            maps = convolutions(leaves[:3], leaves[3:], [Geometry(2, 1)] * 3)
        torch.manual_seed(1)
        gs = [torch.randn_like(y) for y in maps]
        return [*maps, *torch.autograd.grad(maps, wanted, gs)]

    for found, truth in zip(outcome("triton"), outcome("reference"), strict=True):
        assert found.dtype == truth.dtype and found.shape == truth.shape
        torch.testing.assert_close(found, truth, rtol=2**-6, atol=2**-3)


class Convolutions(TorchDispatchMode):
    """Counts torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "aten.convolution" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels", "count"), [(16, 0), (64, 0), (96, 2)])
def test_few_channels_have_kernels_of_their_own(
    channels: int, count: int, device: torch.device
) -> None:
    """Of more the gradient of the weight has one, as before."""
    x, weight = (
        torch.randn(shape, device=device).bfloat16().movedim(-1, 1).requires_grad_()
        for shape in ((1, 3, 5, channels), (32, 3, 3, channels))
    )
    with use_backend("triton"), Convolutions() as torchs:
        (y,) = convolutions([x], [weight], [Geometry(1, 1)])
        y.sum().backward()
    assert torchs.count == count


@pytest.mark.usefixtures("repeatable_convolutions")
def test_gradients_by_finite_differences(device: torch.device) -> None:
    leaves, count = operands(device, torch.float64), len(GEOMETRIES)

    def joined(*leaves: Tensor) -> Tensor:
        maps = convolutions(leaves[:count], leaves[count:], GEOMETRIES)
        return torch.cat([y.flatten() for y in maps])

    with use_backend("triton"):
        assert torch.autograd.gradcheck(joined, leaves, fast_mode=True)


def test_images_have_no_gradient(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(which: int, *operands: object) -> Tensor:
        computed.append(which)
        return convolution_gradient(which, *operands)

    module = sys.modules["lgcnet_fast.ops.convolutions"]
    monkeypatch.setattr(module, "convolution_gradient", counted)
    image = torch.randn(2, 5, 5, 6, device=device)
    weight = torch.randn(4, 5, 3, 3, device=device, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            (y,) = convolutions([image], [weight], GEOMETRIES[1:2])
        found += torch.autograd.grad(y.square().sum(), weight)
    assert computed == [1]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["leaf", "copy", "computed"])
@pytest.mark.parametrize("channels", [3, 5])
def test_whose_gradients_may_come_later(
    channels: int, kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves', and those of copies whose own gradients wait; not where autograd computes on."""
    asked: list[tuple[int, ...] | None] = []
    for name in ("convolutions", "image_convolution"):
        module = sys.modules[f"lgcnet_fast.ops.{name}"]
        monkeypatch.setattr(module, "settle", lambda device, owners: asked.append(owners))
    leaf = torch.randn(2, channels, 3, 3, device=device, requires_grad=True)
    with use_backend("triton"):
        copy = cast_together([leaf], torch.bfloat16)[0]
        weight = {"leaf": leaf, "copy": copy, "computed": leaf * 2}[kind]
        x = torch.randn(1, channels, 4, 4, device=device).to(weight.dtype)
        convolutions([x], [weight], [Geometry(1, 1)])[0].float().sum().backward()
    assert asked == [None if kind == "computed" else (weight.data_ptr(),)]
    assert leaf.grad is not None


def test_gradients_lie_in_memory_as_their_weights(device: torch.device) -> None:
    """So that nothing copies them, which would be reading them."""
    leaves, count = operands(device), len(GEOMETRIES)
    leaves = [leaf.detach().contiguous().requires_grad_() for leaf in leaves]
    with use_backend("triton"):
        maps = convolutions(leaves[:count], leaves[count:], GEOMETRIES)
    gradients = torch.autograd.grad(sum(y.sum() for y in maps), leaves[count:])
    assert [g.stride() for g in gradients] == [leaf.stride() for leaf in leaves[count:]]


def test_a_map_that_nothing_reads(device: torch.device) -> None:
    leaves, count = operands(device), len(GEOMETRIES)
    with use_backend("triton"):
        y = convolutions(leaves[:count], leaves[count:], GEOMETRIES)[1]
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert [bool(g.any()) for g in gradients] == [index % count == 1 for index in range(2 * count)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    x, weight = torch.rand(1, 3, 4, 4), torch.rand(2, 3, 3, 3)
    with use_backend(backend):
        for maps in ([], [x, x]):
            with pytest.raises(OperandError, match=f"xs: {len(maps)} maps, 1 weights"):
                convolutions(maps, [weight], [Geometry()])
        with pytest.raises(OperandError, match=r"xs\[0\]: shape"):
            convolutions([x[0]], [weight], [Geometry()])
        with pytest.raises(OperandError, match=r"weights\[0\]: shape .*need \(c_out, 3, k, k\)"):
            convolutions([x], [weight[:, :2]], [Geometry()])
