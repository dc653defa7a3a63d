"""Resizing by the Triton kernels through the public operations, against their plain forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lgcnet_fast import ops
from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.ops.fused_resize import refuse_resize

Shape = tuple[int, int, int, int]
Size = tuple[int, int]

CONCATENATED: list[tuple[list[Shape], Size]] = [
    ([(2, 3, 2, 3), (2, 2, 3, 5)], (3, 5)),
    ([(1, 1, 1, 1), (1, 4, 2, 2), (1, 3, 5, 3)], (3, 4)),
    ([(1, 3, 4, 4)], (1, 1)),
]
ADDED: list[tuple[list[Shape], Size]] = [
    ([(2, 3, 3, 5), (2, 3, 2, 3), (2, 3, 3, 5)], (3, 5)),
    ([(1, 4, 1, 1), (1, 4, 3, 2)], (4, 3)),
]
CASES = [
    *((ops.concat_upsample, *case) for case in CONCATENATED),
    *((ops.sum_upsample, *case) for case in ADDED),
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random_maps(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    maps = [torch.rand(shape, dtype=torch.float64, device=device) for shape in shapes]
    return [
        x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps
    ]


def with_gradients(
    operation: Callable, backend: str, maps: Sequence[Tensor], size: Size
) -> tuple[Tensor, ...]:
    with ops.use_backend(backend):
        y = operation(maps, size)
    torch.manual_seed(1)
    grad = torch.rand(y.shape, dtype=torch.float64, device=y.device).to(y.dtype)
    return y, *torch.autograd.grad(y, maps, grad)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("operation", "shapes", "size"), CASES)
def test_agrees_with_the_reference(operation, shapes, size, dtype, device) -> None:
    maps = random_maps(shapes, dtype, device)
    exact = [x.detach().double().requires_grad_() for x in maps]
    found = with_gradients(operation, "triton", maps, size)
    expected = with_gradients(operation, "reference", exact, size)
    for ours, truth in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        # A storage dtype rounds the gradient given and the result.
        error = (ours.double() - truth).abs()
        assert (error <= 2 * TOLERANCE[dtype] * (truth.abs() + 1)).all()


@pytest.mark.parametrize(("operation", "shapes", "size"), [CASES[0], CASES[3]])
def test_gradients_are_derivatives(operation, shapes, size, device) -> None:
    maps = random_maps(shapes, torch.float64, device)
    with ops.use_backend("triton"):
        assert torch.autograd.gradcheck(lambda *x: operation(x, size), maps, fast_mode=True)


def test_upsample_is_the_concatenation_of_one(device) -> None:
    (x,) = random_maps([(1, 3, 2, 3)], torch.float32, device)
    with ops.use_backend("triton"):
        assert ops.upsample(x, (2, 3)) is x
        y = ops.upsample(x, (5, 4))
        assert torch.equal(y, ops.concat_upsample([x], (5, 4)))
    torch.testing.assert_close(y, ops.upsample(x, (5, 4)))


def test_other_layouts_and_dtypes_are_converted(device) -> None:
    x, y = random_maps([(2, 3, 2, 3), (2, 4, 3, 5)], torch.float32, device)
    half = y.detach().to(torch.bfloat16).contiguous().requires_grad_()
    sliced = torch.cat([x, x], dim=1)[:, 2:5]
    for operation, maps in ((ops.concat_upsample, [sliced, half]), (ops.sum_upsample, [x, sliced])):
        with ops.use_backend("triton"):
            found = operation(maps, (3, 5))
        torch.testing.assert_close(found, operation(maps, (3, 5)))
        assert found.dtype == torch.float32
    with ops.use_backend("triton"):
        ops.concat_upsample([x, half], (3, 5)).sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_only_what_needs_a_gradient_gets_one(device) -> None:
    x, y = random_maps([(1, 2, 2, 2), (1, 2, 3, 3)], torch.float32, device)
    with ops.use_backend("triton"):
        ops.sum_upsample([x, y.detach()], (3, 3)).sum().backward()
        assert not ops.concat_upsample([x.detach(), y.detach()], (3, 3)).requires_grad
    assert x.grad is not None and y.grad is None


@pytest.mark.parametrize("name", ["concat_upsample", "sum_upsample"])
def test_registration(name, device) -> None:
    operation = getattr(torch.ops.lgcnet_fast, name)
    maps = random_maps([(1, 2, 2, 2), (1, 2, 3, 3)], torch.float32, device)
    torch.library.opcheck(operation, (maps, [3, 3], "triton"))


def test_registration_of_the_gradients(device) -> None:
    (grad,) = random_maps([(1, 4, 3, 3)], torch.float32, device)
    registered, grad = torch.ops.lgcnet_fast, grad.detach()
    torch.library.opcheck(
        registered.concat_upsample_backward, (grad, [1, 3], [2, 2, 3, 3], "triton")
    )
    torch.library.opcheck(registered.sum_upsample_backward, (grad, [2, 2], "triton"))


@pytest.mark.parametrize(
    ("maps", "size", "fault"),
    [
        ([], (3, 3), "maps: none given"),
        ([torch.ones(2, 3, 3)], (3, 3), r"maps\[0\]: shape \(2, 3, 3\), need a map"),
        ([torch.ones(0, 3, 3, 3)], (3, 3), r"maps\[0\]: empty map"),
        ([torch.ones(1, 3, 3, 3).int()], (3, 3), r"maps\[0\]: dtype torch.int32"),
        ([torch.ones(1, 1, 3, 3), torch.ones(2, 1, 3, 3)], (3, 3), r"maps\[1\]: shape \(2,"),
        ([torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3, device="meta")], (3, 3), "on meta"),
        ([torch.ones(1, 1, 3, 3)], (0, 3), r"size: \(0, 3\), need a positive"),
        ([torch.ones(1, 1, 3, 3)], (3,), r"size: \(3,\)"),
    ],
)
@pytest.mark.parametrize("operation", [ops.concat_upsample, ops.sum_upsample])
def test_wrong_arguments_are_named(operation, maps, size, fault) -> None:
    with pytest.raises(OperandError, match=fault):
        operation(maps, size)


def test_a_sum_needs_one_number_of_channels() -> None:
    maps = [torch.ones(1, 2, 3, 3), torch.ones(1, 3, 2, 2)]
    with pytest.raises(OperandError, match=r"maps\[1\]: shape \(1, 3, 2, 2\), need \(1, 2, 2, 2\)"):
        ops.sum_upsample(maps, (3, 3))


def test_what_kernels_cannot_serve_is_refused(device) -> None:
    maps = random_maps([(1, 1, 2, 2)] * 5, torch.float32, device)
    with ops.use_backend("triton"), pytest.raises(BackendError, match="5 maps, a launch takes 4"):
        ops.concat_upsample(maps, (3, 3))
    assert "at most 32768" in str(refuse_resize("triton", maps[0], (1, 40000)))
    assert "float64" in str(refuse_resize("cuda", maps[0].double(), (3, 3)))
    assert refuse_resize("cuda", maps, (3, 3)) is None
