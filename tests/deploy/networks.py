"""Small derived networks whose batch norms have something to fold."""

from __future__ import annotations

import torch
from torch import nn

from lgcnet_fast.nn.operations import CELL_OPS
from lgcnet_fast.space.base import SearchSpace
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.space.registry import make_space

SMALL = {"cells": 5, "reductions": [1, 3], "widths": [4, 8, 16]}
CLASSES = 5


def small_space(**options: object) -> SearchSpace:
    return make_space(SMALL | options)


def genotype_of(space: SearchSpace, **chosen: str) -> Genotype:
    """The same operation on every edge of a group: `cells="sep3", fusion="gp2", up="deconv"`."""
    arch = {
        group.name: _logits(len(group.rows), group.options, chosen.get(group.name))
        for group in space.arch_groups()
    }
    return space.discretise(arch)[0]


def sparse_genotype(space: SearchSpace, seed: int, none_bonus: float = 0.4) -> Genotype:
    """Random, with many `none` edges."""
    generator = torch.Generator().manual_seed(seed)
    arch = {
        group.name: torch.rand(len(group.rows), len(group.options), generator=generator)
        for group in space.arch_groups()
    }
    arch["cells"][:, CELL_OPS.index("none")] += none_bonus
    return space.discretise(arch)[0]


def trained(space: SearchSpace, genotype: Genotype, seed: int = 0) -> nn.Module:
    """The derived network in float64 and eval mode, with batch norms that have much to fold."""
    torch.manual_seed(seed)
    return with_statistics(space.build(genotype, CLASSES).double())


def with_statistics(network: nn.Module) -> nn.Module:
    """Random affine parts, and the statistics that belong to them, so that images matter."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            # Cumulative average: one batch sets the statistics.
            module.momentum = None
    dtype = next(network.parameters()).dtype
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 65, 65, dtype=dtype) + 0.5)
    return network.eval()


def _logits(rows: int, options: tuple[str, ...], chosen: str | None) -> torch.Tensor:
    """Favours `chosen`, or each option in turn."""
    picks = [options.index(chosen)] * rows if chosen else [r % len(options) for r in range(rows)]
    return torch.eye(len(options))[picks]
