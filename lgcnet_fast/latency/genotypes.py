"""Random genotypes to measure: uniform, and with a given share of light operations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lgcnet_fast.space.base import Arch, ArchGroup, SearchSpace
from lgcnet_fast.space.genotype import Genotype

LIGHT_SHARES = (0.1, 0.9)
"""Range of the share of light operations."""


def light_genotype(space: SearchSpace, share: float, generator: torch.Generator) -> Genotype:
    """Rows that have light options take one with probability `share`, else another; each kind
    uniformly. Made valid as by `discretise`."""
    logits: Arch = {}
    for group in space.arch_groups():
        draw = torch.rand(len(group.rows), len(group.options), generator=generator)
        takes_light = torch.rand(len(group.rows), 1, generator=generator) < share
        logits[group.name] = _preferring(draw, group, takes_light)
    return space.discretise(logits)[0]


def _preferring(draw: Tensor, group: ArchGroup, takes_light: Tensor) -> Tensor:
    """Logits (rows, options) whose argmax is among the kind that each row takes, if it has both."""
    light = torch.tensor([option in group.light for option in group.options])
    allowed = torch.ones_like(draw, dtype=torch.bool)
    if group.mask is not None:
        allowed = torch.tensor(group.mask)
    logits = draw + 1.0 * (light == takes_light)
    return logits.masked_fill(~allowed, -torch.inf)


def uniform_genotypes(space: SearchSpace, seed: int) -> Iterator[Genotype]:
    """Without end, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield space.random_genotype(generator)


def varied_genotypes(space: SearchSpace, seed: int) -> Iterator[Genotype]:
    """The same with a share of light operations drawn from U(0.1, 0.9) for each genotype."""
    generator = torch.Generator().manual_seed(seed)
    low, high = LIGHT_SHARES
    while True:
        share = low + (high - low) * float(torch.rand((), generator=generator))
        yield light_genotype(space, share, generator)


def fingerprint(genotype: Genotype) -> str:
    """By which a table remembers what it was fitted to."""
    return hashlib.sha256(genotype.model_dump_json().encode()).hexdigest()[:16]
