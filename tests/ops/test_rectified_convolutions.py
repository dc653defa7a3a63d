"""3x3 convolutions of one ReLU against the reference, which makes the ReLU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.kernels import conv3_walk
from lgcnet_fast.ops import rectified_convolutions, use_backend
from lgcnet_fast.ops.conv3_kernels import (
    conv3_input_gradient,
    conv3_results,
)
from lgcnet_fast.ops.rectified_convolutions import fuses
from tests.combinations import some_combinations

SHAPES = [(1, 32, 1, 1), (2, 64, 3, 5), (1, 32, 7, 9), (1, 48, 3, 5)]


def operands(
    shape: tuple[int, ...], edges: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """A map, and weights to 32 channels, all in NHWC memory."""
    torch.manual_seed(0)
    shapes = [shape, *((32, shape[1], 3, 3) for _ in range(edges))]
    leaves = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in leaves]


def outcome(
    leaves: list[Tensor], backend: str, autocast: bool = False, gs: list[Tensor] | None = None
) -> list[Tensor]:
    device = leaves[0].device.type
    with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
        maps = rectified_convolutions(leaves[0], leaves[1:])
    torch.manual_seed(1)
    if gs is None:
        gs = [torch.randn(y.shape, dtype=torch.float64) for y in maps]
    gs = [g.to(y) for g, y in zip(gs, maps, strict=True)]
    return [*maps, *torch.autograd.grad(maps, leaves, gs)]


@some_combinations("shape, edges", SHAPES, (1, 2, 3))
def test_results_and_gradients(shape: tuple[int, ...], edges: int, device: torch.device) -> None:
    """Against float64, of the same values."""
    leaves = operands(shape, edges, device)
    assert fuses("triton", leaves[0], 32)
    found = outcome(leaves, "triton")
    torch.manual_seed(1)
    gs = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in found[:edges]]
    truth = outcome(
        [leaf.detach().double().requires_grad_() for leaf in leaves], "reference", gs=gs
    )
    for ours, wanted in zip(found, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        scale = wanted.abs().max().item() + 1e-3
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-7, atol=2**-10 * scale)


def test_large_maps_of_few_channels_keep_their_weights_at_hand(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shapes = (2, 3, 5, 48), (48, 3, 3, 48)
    leaves = [torch.randn(shape, device=device).bfloat16().movedim(-1, 1) for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    by_tiles = outcome(leaves, "triton")
    launches: list[int] = []
    launch = conv3_walk._launch

    def counted(*arguments: Any) -> None:
        launches.append(1)
        launch(*arguments)

    monkeypatch.setattr(conv3_walk, "FEWEST_POSITIONS", 30)
    monkeypatch.setattr(conv3_walk, "_launch", counted)
    for found, wanted in zip(outcome(leaves, "triton"), by_tiles, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-4)
    assert len(launches) == 2


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_the_reference(
    dtype: torch.dtype, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgcnet_fast.ops.backend.why_not", lambda *arguments: None)
    x, *weights = operands((2, 32, 3, 5), 2, device, torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    found, wanted = (outcome([x, *weights], name, True) for name in (backend, "reference"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_kernels_do_not_take(dtype: torch.dtype, device: torch.device) -> None:
    leaves = operands((1, 3, 4, 5), 2, device, dtype)
    assert not fuses("triton", leaves[0], 32)
    found, wanted = (outcome(leaves, name) for name in ("triton", "reference"))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_nan_passes(device: torch.device) -> None:
    x, weight = operands((1, 32, 3, 5), 1, device)
    with torch.no_grad():
        x[0, 3, 1, 1] = torch.nan
    y, dx, _ = outcome([x, weight], "triton")
    assert y[..., :3].isnan().all() and not y[..., 3:].isnan().any()
    assert not dx.isnan().any() and dx[0, 3, 1, 1] != 0


def test_neither_relu_nor_results_are_kept(device: torch.device) -> None:
    x, *weights = operands((1, 32, 3, 5), 2, device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), use_backend("triton"):
        rectified_convolutions(x, weights)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *weights)}


def test_a_map_without_gradient_and_one_that_nothing_reads(device: torch.device) -> None:
    x, *weights = operands((1, 32, 3, 5), 2, device)
    with use_backend("triton"):
        y, _ = rectified_convolutions(x.detach(), weights)
    first, second = torch.autograd.grad(y.sum(), weights)
    wanted = torch.nn.grad.conv2d_weight(
        F.relu(x.double()), weights[0].shape, torch.ones_like(y).double(), padding=1
    )
    torch.testing.assert_close(first.double(), wanted, rtol=2**-7, atol=2**-6)
    assert not second.any()


def test_gradients_lie_in_memory_as_their_weights(device: torch.device) -> None:
    x, *weights = operands((1, 32, 3, 5), 2, device)
    weights = [weight.detach().contiguous().requires_grad_() for weight in weights]
    with use_backend("triton"):
        maps = rectified_convolutions(x, weights)
    gradients = torch.autograd.grad(sum(y.sum() for y in maps), weights)
    assert [g.stride() for g in gradients] == [weight.stride() for weight in weights]


def test_registration(device: torch.device) -> None:
    x, *weights = (t.detach() for t in operands((1, 32, 3, 5), 2, device))
    torch.library.opcheck(conv3_results, (x, weights, "triton", True))
    gs = conv3_results(x, weights, "triton", True)
    torch.library.opcheck(conv3_input_gradient, (gs, x, weights, "triton", True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    x, weight = torch.rand(1, 3, 4, 4), torch.rand(2, 3, 3, 3)
    with use_backend(backend):
        for arguments, message in (
            ((x[0], [weight]), "x: shape"),
            ((x, []), "weights: need at least one"),
            ((x, [weight, weight[:1]]), r"weights\[1\]: shape .*need \(2, 3, 3, 3\)"),
            ((x, [weight[:, :2]]), r"weights\[0\]: shape .*need \(2, 3, 3, 3\)"),
            ((x, [weight[..., :1]]), r"weights\[0\]: shape .*need \(2, 3, 3, 3\)"),
        ):
            with pytest.raises(OperandError, match=message):
                rectified_convolutions(*arguments)
