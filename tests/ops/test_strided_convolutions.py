"""3x3 convolutions of stride 2 of one map against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import readers, strided_convolutions, use_backend
from lgcnet_fast.ops.strided_convolutions import fuses


def operands(
    shape: tuple[int, ...], edges: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """A map, and weights to 16 channels, all in NHWC memory."""
    torch.manual_seed(0)
    shapes = [shape, *((16, shape[1], 3, 3) for _ in range(edges))]
    leaves = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in leaves]


def outcome(leaves: list[Tensor], backend: str, autocast: bool = False) -> list[Tensor]:
    device = leaves[0].device.type
    with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
        maps = strided_convolutions(leaves[0], leaves[1:])
    torch.manual_seed(1)
    gs = [torch.randn(y.shape, dtype=torch.float64).bfloat16().to(y) for y in maps]
    return [*maps, *torch.autograd.grad(maps, leaves, gs)]


@pytest.mark.parametrize("edges", [1, 2])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 8, 4, 5), (1, 24, 5, 2)], ids=str)
def test_results_and_gradients(shape: tuple[int, ...], edges: int, device: torch.device) -> None:
    """Against float64, of the same values."""
    leaves = operands(shape, edges, device)
    assert fuses(leaves[0], leaves[1])
    truth = outcome([leaf.detach().double().requires_grad_() for leaf in leaves], "reference")
    for ours, wanted in zip(outcome(leaves, "triton"), truth, strict=True):
        assert ours.dtype == torch.bfloat16
        scale = wanted.abs().max().item() + 1e-3
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-7, atol=2**-10 * scale)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_the_reference(
    dtype: torch.dtype, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgcnet_fast.ops.backend.why_not", lambda *arguments: None)
    x, *weights = operands((2, 8, 3, 5), 2, device, torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    found, wanted = (outcome([x, *weights], name, True) for name in (backend, "reference"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_kernels_do_not_take(dtype: torch.dtype, device: torch.device) -> None:
    leaves = operands((1, 3, 4, 5), 2, device, dtype)
    found, wanted = (outcome(leaves, name) for name in ("triton", "reference"))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_which_readers_stride(device: torch.device) -> None:
    x, weight = operands((1, 8, 3, 5), 1, device)
    with use_backend("triton"):
        assert readers(x).strides(weight)
        assert not readers(x.float()).strides(weight)
        assert not readers(x).strides(weight[:, :, :1, :1])
    with use_backend("reference"):
        assert not readers(x).strides(weight)


def test_a_map_without_gradient_and_one_that_nothing_reads(device: torch.device) -> None:
    x, *weights = operands((1, 8, 3, 5), 2, device)
    with use_backend("triton"):
        y, _ = strided_convolutions(x.detach(), weights)
    first, second = torch.autograd.grad(y.sum(), weights)
    assert first.any() and not second.any()


def test_gradients_lie_in_memory_as_their_weights(device: torch.device) -> None:
    x, *weights = operands((1, 8, 3, 5), 2, device)
    weights = [weight.detach().contiguous().requires_grad_() for weight in weights]
    with use_backend("triton"):
        maps = strided_convolutions(x, weights)
    gradients = torch.autograd.grad(sum(y.sum() for y in maps), weights)
    assert [g.stride() for g in gradients] == [weight.stride() for weight in weights]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    x, weight = torch.rand(1, 3, 4, 4), torch.rand(2, 3, 3, 3)
    with use_backend(backend):
        for arguments, message in (
            ((x[0], [weight]), "x: shape"),
            ((x, []), "weights: need at least one"),
            ((x, [weight, weight[:1]]), r"weights\[1\]: shape .*need \(2, 3, 3, 3\)"),
            ((x, [weight[:, :2]]), r"weights\[0\]: shape .*need \(2, 3, 3, 3\)"),
        ):
            with pytest.raises(OperandError, match=message):
                strided_convolutions(*arguments)
