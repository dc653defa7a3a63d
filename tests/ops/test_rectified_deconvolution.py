"""Transposed convolutions of a ReLU against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import rectified_deconvolution, use_backend
from lgcnet_fast.ops.conv3_stride2_kernels import (
    strided_convolutions_forward,
    strided_weight_gradients,
    transposed_convolutions,
)

SIZES = [((1, 1), (1, 2)), ((2, 3), (4, 5)), ((3, 2), (5, 4))]


def operands(
    size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """A map of 8 channels and a weight to 16, in NHWC memory."""
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape, dtype=torch.float64).to(device, dtype)
        for shape in ((2, 8, *size), (8, 16, 3, 3))
    ]
    x, weight = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in leaves)
    return x, weight


def outcome(
    x: Tensor, weight: Tensor, size: tuple[int, int], backend: str, autocast: bool = False
) -> list[Tensor]:
    with use_backend(backend), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = rectified_deconvolution(x, weight, size)
    torch.manual_seed(1)
    g = torch.randn(y.shape, dtype=torch.float64).bfloat16().to(y)
    return [y, *torch.autograd.grad(y, (x, weight), g)]


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_results_and_gradients(
    size: tuple[int, int], target: tuple[int, int], device: torch.device
) -> None:
    """Against float64, of the same values."""
    leaves = operands(size, device)
    found = outcome(*leaves, target, "triton")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = outcome(*exact, target, "reference")
    for ours, wanted in zip(found, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        scale = wanted.abs().max().item() + 1e-3
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-7, atol=2**-10 * scale)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_the_reference(
    dtype: torch.dtype, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgcnet_fast.ops.backend.why_not", lambda *arguments: None)
    x, weight = operands((2, 3), device, torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    found, wanted = (outcome(x, weight, (3, 6), name, True) for name in (backend, "reference"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_kernels_do_not_take(dtype: torch.dtype, device: torch.device) -> None:
    leaves = operands((2, 3), device, dtype)
    found, wanted = (outcome(*leaves, (4, 5), name) for name in ("triton", "reference"))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_map_without_gradient(device: torch.device) -> None:
    x, weight = operands((2, 3), device)
    with use_backend("triton"):
        y = rectified_deconvolution(x.detach(), weight, (3, 5))
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert dw.any()


def test_gradients_lie_in_memory_as_their_weights(device: torch.device) -> None:
    x, weight = operands((2, 3), device)
    weight = weight.detach().contiguous().requires_grad_()
    with use_backend("triton"):
        (dw,) = torch.autograd.grad(rectified_deconvolution(x, weight, (3, 5)).sum(), weight)
    assert dw.stride() == weight.stride()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("served", [False, True])
def test_registration(
    served: bool, relu: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels, and where they do not serve: equal results."""
    monkeypatch.setattr("lgcnet_fast.kernels.conv3_stride2.serves", lambda x, weight: served)
    y, weight = (t.detach() for t in operands((2, 3), device))
    weights = [weight, weight.flip(2).contiguous(memory_format=torch.channels_last)]
    ys, mask = [y, y.neg()], y if relu else None
    torch.library.opcheck(transposed_convolutions, (ys, weights, (3, 6), relu))
    x = transposed_convolutions(ys, weights, (3, 6), relu)
    torch.library.opcheck(strided_convolutions_forward, (x, weights, mask))
    torch.library.opcheck(strided_weight_gradients, (ys, [x, x], weights, relu))
    back = strided_convolutions_forward(x, weights, mask)
    dws = strided_weight_gradients(ys, [x, x], weights, relu)
    exact = [y.double().relu() if relu else y.double() for y in ys]
    pairs = list(zip(exact, (w.double() for w in weights), strict=True))
    truth = sum(F.conv_transpose2d(y, w, None, 2, 1, (0, 1)) for y, w in pairs)
    torch.testing.assert_close(x.double(), truth, rtol=2**-6, atol=2**-3)
    for (y, w), found, dw in zip(pairs, back, dws, strict=True):
        truth = F.conv2d(x.double(), w, stride=2, padding=1)
        if mask is not None:
            truth = truth * (mask > 0)
        torch.testing.assert_close(found.double(), truth, rtol=2**-7, atol=2**-2)
        truth = torch.nn.grad.conv2d_weight(x.double(), w.shape, y, stride=2, padding=1)
        torch.testing.assert_close(dw.double(), truth, rtol=2**-7, atol=2**-3)


def test_nan_passes(device: torch.device) -> None:
    x, weight = operands((2, 3), device)
    with torch.no_grad():
        x[0, 3, 1, 1] = torch.nan
    y, dx, _ = outcome(x, weight, (3, 5), "triton")
    assert y[0].isnan().any() and not y[1].isnan().any()
    assert not dx.isnan().any() and dx[0, 3, 1, 1] != 0


def test_the_relu_is_not_kept(device: torch.device) -> None:
    x, weight = operands((2, 3), device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), use_backend("triton"):
        rectified_deconvolution(x, weight, (3, 5))
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    x, weight = torch.rand(1, 3, 4, 4), torch.rand(3, 2, 3, 3)
    with use_backend(backend):
        for arguments, message in (
            ((x[0], weight, (8, 8)), "x: shape"),
            ((x, weight[0], (8, 8)), r"weight: shape .*need \(3, c_out, 3, 3\)"),
            ((x, weight[:2], (8, 8)), r"weight: shape .*need \(3, 2, 3, 3\)"),
            ((x, weight[..., :1], (8, 8)), r"weight: shape .*need \(3, 2, 3, 3\)"),
            ((x, weight, (8, 9)), r"size: \(8, 9\), need"),
            ((x, weight, (8,)), r"size: \(8,\), need"),
        ):
            with pytest.raises(OperandError, match=message):
                rectified_deconvolution(*arguments)
