"""A whole supernet under the Triton backend against the reference."""

from __future__ import annotations

import copy

import pytest
import torch

from lgcnet_fast.ops import upsample_cross_entropy, use_backend
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.space.sampling import gumbel_softmax

CLASSES = 3


@pytest.mark.slow
def test_a_step_of_the_supernet() -> None:
    """Loss, gradients of weights and architecture, running statistics."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    space = make_space(
        {"cells": 4, "reductions": [1, 2], "widths": [8, 16, 32], "search_width_mult": 0.25}
    )
    torch.manual_seed(0)
    arch = space.build_arch().to(device)
    supernet = space.build_supernet(CLASSES).to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 17, 17, 3, device=device).movedim(-1, 1)
    target = torch.randint(CLASSES, (2, 17, 17), device=device)
    found = {}
    for backend in ("reference", "triton"):
        network, architecture = copy.deepcopy(supernet), copy.deepcopy(arch)
        generator = torch.Generator(device).manual_seed(0)
        with use_backend(backend):
            z = gumbel_softmax(architecture(), 1.0, generator, space.arch_groups())
            loss = upsample_cross_entropy(network(x, z), target)
        loss.backward()
        parameters = [*network.named_parameters(), *architecture.named_parameters()]
        gradients = {f"gradient of {name}": p.grad for name, p in parameters}
        found[backend] = {"loss": loss.detach()} | gradients | network.state_dict()
    for name, wanted in found["reference"].items():
        scale = wanted.double().square().mean().sqrt()
        error = (found["triton"][name] - wanted).abs().max()
        assert error <= 0.02 * scale + 1e-5, (name, error, scale)
