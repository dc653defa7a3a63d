"""Convolutions of the even and of the odd pixels: fused form against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.kernels import interleaved as kernel
from lgcnet_fast.ops import interleaved_convolution, use_backend
from lgcnet_fast.ops.interleaved_convolution import _gradients, _interleaved

SIZES = [(6, 8), (5, 7), (5, 6), (6, 5), (1, 1), (2, 1)]


def case(
    size: tuple[int, int], outputs: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, *size, 3, dtype=torch.float64).movedim(-1, 1)
    weights = [torch.randn(count, 3, 1, 1, dtype=torch.float64) for count in outputs]
    return [tensor.to(device, dtype).requires_grad_() for tensor in (x, *weights)]


def outcome(backend: str, inputs: list[Tensor]) -> list[Tensor]:
    with use_backend(backend):
        y = interleaved_convolution(*inputs)
    torch.manual_seed(1)
    g = torch.randn(y.shape, dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad(y, inputs, g)]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("outputs", [(4, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("size", SIZES)
def test_fused_equals_reference(
    kernels: bool,
    size: tuple[int, int],
    outputs: tuple[int, int],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = case(size, outputs, device, torch.float64)
    if not kernels:
        monkeypatch.setattr(kernel, "serves", lambda x, even, odd: False)
    found, wanted = (outcome(backend, inputs) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, wanted)
    for value in found:
        assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(2, 4), (3, 2)])
def test_gradients_by_finite_differences(size: tuple[int, int], device: torch.device) -> None:
    inputs = case(size, (2, 3), device, torch.float64)
    with use_backend("triton"):
        assert torch.autograd.gradcheck(interleaved_convolution, inputs)


def test_registration(device: torch.device) -> None:
    x, even, odd = (tensor.detach() for tensor in case((3, 4), (2, 3), device, torch.float32))
    torch.library.opcheck(_interleaved, (x, even, odd, "triton"))
    g = _interleaved(x, even, odd, "triton")
    torch.library.opcheck(_gradients, (g, x, even, odd, "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    inputs = case((6, 5), (2, 3), device, torch.float32)
    exact = outcome("reference", [tensor.detach().double().requires_grad_() for tensor in inputs])
    inputs[1:] = [weight.detach().to(dtype).requires_grad_() for weight in inputs[1:]]
    with torch.autocast(device.type, torch.bfloat16):
        found = outcome("triton", inputs)
    assert [value.dtype for value in found] == [torch.bfloat16, torch.float32, dtype, dtype]
    for value, wanted in zip(found, exact, strict=True):
        assert (value.double() - wanted).norm() < 0.02 * wanted.norm()


def test_only_the_map_and_weights_are_kept(device: torch.device) -> None:
    x, even, odd = case((7, 8), (2, 2), device, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        interleaved_convolution(x, even, odd)
    maps = [tensor for tensor in kept if len(tensor) == len(x) and tensor.shape[-1] > 3]
    assert [tensor.data_ptr() for tensor in maps] == [x.data_ptr()]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    x, w = torch.rand(1, 3, 4, 4), torch.rand(2, 3, 1, 1)
    with use_backend(backend):
        for arguments, message in (
            ((x[0], w, w), "x: shape"),
            ((x, w[:, :2], w), "even: shape"),
            ((x, w, torch.rand(2, 3, 3, 3)), "odd: shape"),
            ((x, w, w.to("meta")), "odd: on meta"),
        ):
            with pytest.raises(OperandError, match=message):
                interleaved_convolution(*arguments)


def test_mixed_weights_are_refused(device: torch.device) -> None:
    x, even, odd = case((4, 4), (2, 2), device, torch.float32)
    with use_backend("triton"), pytest.raises(BackendError, match="odd is torch.float64"):
        interleaved_convolution(x, even, odd.double())
