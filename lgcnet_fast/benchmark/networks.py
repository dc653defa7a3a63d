"""Networks of genotypes with random weights: time does not depend on what a network has learnt."""

from __future__ import annotations

import torch
from torch import nn

from lgcnet_fast.ops import use_backend
from lgcnet_fast.space.base import SegmentationNetwork
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.space.registry import get_space

SETTLING_SIZE = (129, 257)
"""Of the noise that batch norms learn their statistics from."""


def random_network(genotype: Genotype, num_classes: int) -> SegmentationNetwork:
    """In eval mode, on the CPU; the same weights every time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return get_space(genotype.space).build(genotype, num_classes).eval()


def settle_batch_norms(network: nn.Module) -> None:
    """Gives batch norms the statistics of what passes through them.

    With those they are created with, maps shrink or grow from layer to layer, so that half
    precision under- or overflows and no two ways of computing can be compared. The network is on
    the CPU.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad(), use_backend("reference"):
        network(torch.randn(2, 3, *SETTLING_SIZE, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
