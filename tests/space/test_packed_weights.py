"""Whole networks, whose second pass stacks no weights operation by operation."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lgcnet_fast.ops import use_backend
from lgcnet_fast.space.registry import make_space

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# Triton reads this when it is first imported.
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

SPACE = {"name": "lgcnet", "cells": 2, "reductions": [1], "widths": [4, 8], "head": "none"}
CLASSES = 3
WINDOW, MATRIX = torch.ops.aten.stack.default, torch.ops.aten._foreach_copy_.default


class Packing(TorchDispatchMode):
    """Counts what stacks the weights of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = self.matrices = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.windows += operation is WINDOW
        self.matrices += operation is MATRIX
        return operation(*args, **(kwargs or {}))


def supernet() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    space = make_space(SPACE)
    z = {name: a.detach().softmax(-1).to(DEVICE) for name, a in space.build_arch()().items()}
    return space.build_supernet(CLASSES), lambda network, x: network(x, z)


def derived(kind: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    space = make_space(SPACE)
    genotype = space.random_genotype(torch.Generator().manual_seed(1))
    build = space.build if kind == "derived" else space.build_classifier
    return build(genotype, CLASSES), lambda network, x: network(x)


SUPERNET = pytest.param("supernet", marks=() if CUDA else pytest.mark.slow)


@pytest.mark.parametrize(
    "kind", [SUPERNET, "derived", pytest.param("classifier", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("half", [False, True])
def test_the_second_pass_finds_all_stacks(half: bool, kind: str) -> None:
    torch.manual_seed(0)
    network, call = supernet() if kind == "supernet" else derived(kind)
    network = network.to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, 9, 9, 3, device=DEVICE).movedim(-1, 1)
    maps, counts = [], []
    for _ in range(2):
        autocast = torch.autocast(DEVICE.type, torch.float16, enabled=half)
        with use_backend("triton"), torch.no_grad(), autocast, Packing() as packing:
            maps.append(call(network, x))
        counts.append((packing.windows, packing.matrices))
    (first, _), second = counts
    # All other weights are cast together.
    assert first > 0 and second == (0, int(half))
    assert torch.equal(*maps)
