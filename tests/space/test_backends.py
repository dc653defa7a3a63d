"""A whole supernet, loss and every gradient, on each backend against the reference."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast import ops
from lgcnet_fast.space.registry import make_space

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# Triton reads this when it is first imported.
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

SMALL = {"cells": 3, "reductions": [1, 2], "taps": [0, 1, 2], "widths": [4, 4, 8]}
LARGE = {"cells": 5, "reductions": [1, 3], "taps": [0, 2, 4], "widths": [16, 32, 64]}
CLASSES = 5


def case(options: dict, side: int) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """A supernet in float64, one draw of Z, images and labels."""
    torch.manual_seed(0)
    space = make_space({"name": "lgcnet", **options})
    network = space.build_supernet(CLASSES).double()
    network = network.to(device=DEVICE, memory_format=torch.channels_last)
    z = {name: torch.randn_like(a).double().softmax(-1) for name, a in space.build_arch()().items()}
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    labels = torch.randint(CLASSES, (2, side, side))
    labels[0, : side // 4] = 255
    images = images.to(DEVICE, memory_format=torch.channels_last)
    return (
        network,
        {name: a.detach().to(DEVICE) for name, a in z.items()},
        images,
        labels.to(DEVICE),
    )


def step(
    backend: str, dtype: torch.dtype, network: nn.Module, z: dict[str, Tensor], images, labels
) -> list[Tensor]:
    """Loss, gradients of Z, gradients of the weights."""
    network = copy.deepcopy(network).to(dtype)
    z = {name: a.to(dtype, copy=True).requires_grad_() for name, a in z.items()}
    with ops.use_backend(backend):
        loss = ops.upsample_cross_entropy(network(images.to(dtype), z), labels)
    loss.backward()
    gradients = [a.grad for a in (*z.values(), *network.parameters())]
    return [loss.detach(), *(g for g in gradients if g is not None)]


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative distance, in the norm, of any of the results."""
    assert len(found) == len(truth) > 50
    largest = max(b.norm() for b in truth)
    return max(
        ((a.double() - b).norm() / (b.norm() + 1e-6 * largest)).item()
        for a, b in zip(found, truth, strict=True)
    )


@pytest.mark.skipif(CUDA, reason="compiled kernels are tested at a larger size")
@pytest.mark.slow
def test_interpreted_kernels_are_exact() -> None:
    given = case(SMALL, 33)
    truth = step("reference", torch.float64, *given)
    assert distance(step("triton", torch.float64, *given), truth) < 1e-9


@pytest.mark.gpu
def test_compiled_kernels_are_exact() -> None:
    given = case(LARGE, 129)
    truth = step("reference", torch.float64, *given)
    assert distance(step("triton", torch.float64, *given), truth) < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("without_tf32")
def test_single_precision_is_as_close_as_the_reference(backend: str) -> None:
    given = case(LARGE, 129)
    truth = step("reference", torch.float64, *given)
    plain = distance(step("reference", torch.float32, *given), truth)
    assert distance(step(backend, torch.float32, *given), truth) < 10 * plain + 1e-4
