"""Networks by name: the reference genotype and random ones that are the same in every run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lgcnet_fast.space.genotype import Genotype, load_genotype
from lgcnet_fast.space.registry import make_space

RANDOM_COUNT = 10
RANDOM = tuple(f"random-{number}" for number in range(RANDOM_COUNT))


def genotype_named(name: str, space: dict[str, Any] | None = None) -> Genotype:
    """`random-N` is a genotype of LGCNet with these options; other names are stored ones."""
    if name not in RANDOM:
        return load_genotype(name)
    generator = torch.Generator().manual_seed(int(name.removeprefix("random-")))
    return make_space({"name": "lgcnet", **(space or {})}).random_genotype(generator)


def expanded(names: Iterable[str]) -> list[str]:
    """`random` stands for all the random ones."""
    return [each for name in names for each in (RANDOM if name == "random" else (name,))]
