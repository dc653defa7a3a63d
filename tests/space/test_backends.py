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
LARGE = {"cells": 3, "reductions": [1, 2], "taps": [0, 1, 2], "widths": [48, 48, 96]}
"""Few numbers of channels and of maps to a node: kernels are compiled anew for each."""
CLASSES = 5
DRAWS = 4


def case(
    options: dict, side: int, seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """A supernet in float64, one draw of Z, images and labels."""
    torch.manual_seed(seed)
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


def distances(found: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Of each of the results, relative and in the norm."""
    assert len(found) == len(truth) > 50
    largest = max(b.norm() for b in truth)
    return torch.stack(
        [
            (a.double() - b).norm() / (b.norm() + 1e-6 * largest)
            for a, b in zip(found, truth, strict=True)
        ]
    )


@pytest.mark.skipif(CUDA, reason="compiled kernels are tested at a larger size")
@pytest.mark.slow
def test_interpreted_kernels_are_exact() -> None:
    given = case(SMALL, 33)
    truth = step("reference", torch.float64, *given)
    assert distances(step("triton", torch.float64, *given), truth).max() < 1e-9


@pytest.mark.gpu
def test_compiled_kernels_are_exact() -> None:
    given = case(LARGE, 65)
    truth = step("reference", torch.float64, *given)
    assert distances(step("triton", torch.float64, *given), truth).max() < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.usefixtures("without_tf32")
def test_single_precision_is_as_close_as_the_reference(backend: str) -> None:
    """In the best of several draws, for each result.

    Rounding that batch norms over a few pooled means enlarge turns the sign of single values before
    a ReLU in some draws; wrong arithmetic, or TF32, shows in all.
    """
    draws: dict[str, list[Tensor]] = {backend: [], "reference": []}
    for seed in range(DRAWS):
        given = case(LARGE, 65, seed)
        truth = step("reference", torch.float64, *given)
        for name, found in draws.items():
            found.append(distances(step(name, torch.float32, *given), truth))
    fused, plain = (torch.stack(found).amin(0) for found in draws.values())
    assert (fused <= 3 * plain + 5e-3).all(), (fused - 3 * plain).max()
