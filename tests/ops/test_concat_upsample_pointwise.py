"""The convolution of a concatenation by every form through the public operation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast import ops
from lgcnet_fast.errors import BackendError, OperandError
from tests.combinations import some_combinations

Shape = tuple[int, int, int, int]
Size = tuple[int, int]
CASES: list[tuple[list[Shape], Size, int, bool]] = [
    ([(2, 3, 3, 5), (2, 2, 2, 3)], (3, 5), 4, True),
    ([(1, 1, 1, 1)], (1, 1), 1, True),
    ([(1, 17, 4, 3), (1, 5, 4, 3), (1, 3, 2, 2)], (4, 3), 20, False),
    ([(2, 3, 2, 2), (2, 1, 5, 3), (2, 4, 1, 1), (2, 2, 3, 4)], (3, 4), 3, True),
    ([(1, 48, 3, 3), (1, 48, 3, 3), (1, 48, 3, 3)], (3, 3), 48, True),
    ([(1, 4, 2, 2), (1, 3, 3, 3)], (3, 3), 130, True),
]
STEP = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=["triton", "library"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, or what runs where they do not serve."""
    if request.param == "library":
        monkeypatch.setattr(
            "lgcnet_fast.kernels.concat_pointwise.serves", lambda x, out_channels: False
        )
    return str(request.param)


def operands(
    shapes: Sequence[Shape], out_channels: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Maps in NHWC memory, of values that both signs have, then the weight."""
    torch.manual_seed(0)
    maps = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
    channels = sum(shape[1] for shape in shapes)
    weight = torch.randn(out_channels, channels, 1, 1, dtype=torch.float64, device=device)
    leaves = [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in maps]
    return [x.requires_grad_() for x in (*leaves, (weight / channels**0.5).to(dtype))]


def both_ways(backend: str, leaves: Sequence[Tensor], size: Size, relu: bool) -> list[Tensor]:
    *maps, weight = leaves
    with ops.use_backend(backend):
        y = ops.concat_upsample_pointwise(maps, size, weight, relu)
    torch.manual_seed(1)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad(y, leaves, grad)]


@some_combinations("case, dtype", CASES, tuple(STEP))
def test_agrees_with_float64(case, dtype, form, device) -> None:
    shapes, size, out_channels, relu = case
    leaves = operands(shapes, out_channels, dtype, device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = both_ways("triton", leaves, size, relu)
    truths = both_ways("reference", exact, size, relu)
    for ours, truth, like in zip(found, truths, (found[0], *leaves), strict=True):
        assert ours.dtype == dtype and ours.shape == like.shape
        if like is not leaves[-1]:
            assert ours.is_contiguous(memory_format=torch.channels_last)
        # The resized values and the gradients of them are rounded, and then the result.
        scale = truth.abs().max() + 1
        assert (ours.double() - truth).abs().max() <= 4 * STEP[dtype] * scale


def test_the_reference_is_convolution_of_the_concatenation() -> None:
    *maps, weight = operands(CASES[0][0], 4, torch.float32, torch.device("cpu"))
    for relu in (False, True):
        x = ops.concat_upsample(maps, (3, 5))
        wanted = F.conv2d(F.relu(x) if relu else x, weight)
        with ops.use_backend("reference"):
            assert torch.equal(ops.concat_upsample_pointwise(maps, (3, 5), weight, relu), wanted)


@some_combinations("relu, form", (False, True), ("triton", "library"), indirect=["form"])
def test_gradients_are_derivatives(relu, form, device) -> None:
    leaves = operands([(1, 2, 3, 4), (1, 1, 2, 2), (1, 2, 5, 3)], 3, torch.float64, device)

    def convolve(*leaves: Tensor) -> Tensor:
        return ops.concat_upsample_pointwise(leaves[:-1], (3, 4), leaves[-1], relu)

    with ops.use_backend("triton"):
        assert torch.autograd.gradcheck(convolve, leaves, fast_mode=True)


def test_only_maps_and_weight_are_kept(form, device) -> None:
    *maps, weight = operands(CASES[0][0], 4, torch.float32, device)
    kept: list[Tensor] = []
    with (
        ops.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        ops.concat_upsample_pointwise(maps, (3, 5), weight)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*maps, weight)}


def test_autocast(form, device) -> None:
    leaves = operands(CASES[0][0], 4, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        reference, fused = (
            both_ways(name, leaves, (3, 5), True) for name in ("reference", "triton")
        )
    for found, wanted in zip(fused, reference, strict=True):
        assert found.dtype == wanted.dtype
        # The maps are rounded before they are resized, or after.
        torch.testing.assert_close(found, wanted, rtol=2**-5, atol=2**-5)


def test_other_layouts_and_dtypes_are_converted(form, device) -> None:
    x, y, weight = operands([(2, 3, 3, 5), (2, 2, 2, 3)], 4, torch.float32, device)
    sliced = torch.cat([x, x], dim=1)[:, 2:5].detach().requires_grad_()
    half = y.detach().to(torch.bfloat16).contiguous().requires_grad_()
    weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [sliced, half, weight]
    fused = both_ways("triton", leaves, (3, 5), True)
    assert [g.dtype for g in fused[1:]] == [g.dtype for g in leaves]
    truths = both_ways(
        "reference", [x.detach().double().requires_grad_() for x in leaves], (3, 5), True
    )
    for found, truth in zip(fused, truths, strict=True):
        rtol = 2**-7 if found.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), truth, rtol=rtol, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one(device) -> None:
    x, y, weight = operands(CASES[0][0], 4, torch.float32, device)
    with ops.use_backend("triton"):
        ops.concat_upsample_pointwise([x, y.detach()], (3, 5), weight.detach()).sum().backward()
        maps = [x.detach(), y.detach()]
        assert not ops.concat_upsample_pointwise(maps, (3, 5), weight.detach()).requires_grad
    assert x.grad is not None and y.grad is None and weight.grad is None


@some_combinations(
    "shapes, form",
    (CASES[0][0], [(2, 3, 3, 5), (2, 2, 3, 5)]),
    ("triton", "library"),
    indirect=["form"],
)
def test_registration(shapes, form, device) -> None:
    *maps, weight = operands(shapes, 4, torch.float32, device)
    registered = torch.ops.lgcnet_fast
    arguments = ([3, 5], weight, True, "triton")
    torch.library.opcheck(registered.concat_upsample_pointwise, (maps, *arguments))
    with torch.no_grad():
        grad = registered.concat_upsample_pointwise(maps, *arguments)
    constants = [x.detach() for x in maps], [3, 5], weight.detach(), True, "triton"
    torch.library.opcheck(registered.concat_upsample_pointwise_backward, (grad, *constants))


def test_explained(device) -> None:
    *maps, weight = operands(CASES[0][0], 4, torch.float32, device)
    verdicts = ops.explain("concat_upsample_pointwise", maps, (3, 5), weight, True)
    assert verdicts["triton"] == verdicts["reference"] == "serves"
    five = [maps[0]] * 5
    verdicts = ops.explain("concat_upsample_pointwise", five, (3, 5), weight, True)
    assert verdicts["triton"] == "5 maps, a launch takes 4"
    with ops.use_backend("triton"), pytest.raises(BackendError, match="5 maps"):
        wide = torch.ones(4, 15, 1, 1, device=device)
        ops.concat_upsample_pointwise(five, (3, 5), wide)


X = torch.ones(1, 2, 3, 3)
W = torch.ones(4, 4, 1, 1)


@pytest.mark.parametrize(
    ("maps", "size", "weight", "fault"),
    [
        ([], (3, 3), W, "maps: none given"),
        ([X, X[0]], (3, 3), W, r"maps\[1\]: shape \(2, 3, 3\), need a map"),
        ([X, X[:0]], (3, 3), W, r"maps\[1\]: empty map"),
        ([X, X.int()], (3, 3), W, r"maps\[1\]: dtype torch.int32"),
        ([X, torch.ones(2, 2, 3, 3)], (3, 3), W, r"maps\[1\]: shape \(2, 2, 3, 3\), need \(1,"),
        ([X, X.to("meta")], (3, 3), W, r"maps\[1\]: on meta"),
        ([X, X], (0, 3), W, r"size: \(0, 3\)"),
        ([X, X], (3, 3), W[..., 0], r"weight: shape \(4, 4, 1\), need \(c_out, 4, 1, 1\)"),
        ([X, X], (3, 3), W[:0], r"weight: shape \(0, 4, 1, 1\)"),
        ([X], (3, 3), W, r"weight: shape \(4, 4, 1, 1\), need \(4, 2, 1, 1\)"),
        ([X, X], (3, 3), W.expand(4, 4, 3, 3), r"weight: shape \(4, 4, 3, 3\)"),
        ([X, X], (3, 3), W.to("meta"), r"weight: on meta, maps\[0\] is on cpu"),
        ([X, X], (3, 3), W.double(), "weight: torch.float64, the maps give torch.float32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_wrong_arguments_are_named(backend, maps, size, weight, fault) -> None:
    with ops.use_backend(backend), pytest.raises(OperandError, match=fault):
        ops.concat_upsample_pointwise(maps, size, weight)
