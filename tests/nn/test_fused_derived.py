"""Derived networks under the Triton backend against the reference, in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.nn.cell import DerivedCell
from lgcnet_fast.ops import upsample_cross_entropy, use_backend
from lgcnet_fast.space.lgcnet_genotype import LGCNetGenotype
from lgcnet_fast.space.networks import DerivedNetwork
from lgcnet_fast.space.registry import make_space

CLASSES = 3
CELLS = {
    "all edges": ("dil3_2", "sep3", "max3", "dil3_8", "max3"),
    "shared maps": ("max3", "conv3", "max3", "sep3", "sep3"),
    "only convolutions": ("conv3", "conv3", "conv3", "conv3", "conv3"),
    "no norms": ("skip", "max3", "none", "skip", "skip"),
    "unreached node": ("none", "none", "dil3_4", "none", "none"),
}


def outcome(network: nn.Module, inputs: list[Tensor], backend: str) -> dict[str, Tensor]:
    """Output, gradients and state after one step of a copy of `network`."""
    network = copy.deepcopy(network)
    with use_backend(backend):
        out = network(*inputs)
    torch.manual_seed(2)
    g = torch.randn(out.shape, dtype=out.dtype).to(out.device)
    leaves = {f"input {index}": x for index, x in enumerate(inputs)}
    leaves |= dict(network.named_parameters())
    # Of what nothing depends on, the gradient may be missing or zero.
    found = torch.autograd.grad(
        out, list(leaves.values()), g, allow_unused=True, materialize_grads=True
    )
    gradients = {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}
    return {"output": out} | gradients | network.state_dict()


def assert_same(network: nn.Module, inputs: list[Tensor]) -> None:
    reference, fused = (outcome(network, inputs, name) for name in ("reference", "triton"))
    assert list(fused) == list(reference)
    for name, wanted in reference.items():
        torch.testing.assert_close(fused[name], wanted, rtol=1e-7, atol=1e-9, msg=name)


def random_map(*shape: int, device: torch.device) -> Tensor:
    images, channels, height, width = shape
    values = torch.randn(images, height, width, channels, dtype=torch.float64, device=device)
    return values.movedim(-1, 1).requires_grad_()


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_derived_cell(name: str, reduction: bool, device: torch.device) -> None:
    """Every cell in both modes, both modes with reductions and without."""
    torch.manual_seed(0)
    training = reduction == bool(list(CELLS).index(name) % 2)
    cell = DerivedCell(3, 4, 4, reduction, False, CELLS[name]).double().train(training)
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    cell = cell.to(device, memory_format=torch.channels_last)
    inputs = [random_map(2, channels, 3, 6, device=device) for channels in (3, 4)]
    assert_same(cell, inputs)


@pytest.mark.slow
def test_a_step_of_a_derived_network(device: torch.device) -> None:
    """Loss, gradients and running statistics; a second pass finds the parameters in place."""
    network = _network().to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 17, 33, dtype=torch.float64, device=device)
    target = torch.randint(CLASSES, (2, 17, 33), device=device)
    found = {}
    for backend in ("reference", "triton"):
        own = copy.deepcopy(network)
        with use_backend(backend):
            loss = upsample_cross_entropy(own(x), target)
        loss.backward()
        gradients = {f"gradient of {name}": p.grad for name, p in own.named_parameters()}
        found[backend] = {"loss": loss.detach()} | gradients | own.state_dict()
    for name, wanted in found["reference"].items():
        torch.testing.assert_close(found["triton"][name], wanted, rtol=1e-6, atol=1e-8, msg=name)


def _network() -> DerivedNetwork:
    torch.manual_seed(0)
    space = make_space({"cells": 4, "reductions": [1, 2], "widths": [8, 16, 32]})
    genotype = space.random_genotype(torch.Generator().manual_seed(1))
    assert isinstance(genotype, LGCNetGenotype)
    return DerivedNetwork(genotype, CLASSES).double()
