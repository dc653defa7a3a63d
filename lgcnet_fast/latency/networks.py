"""Timing whole networks of a space: what tables of engines are fitted to and checked against."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lgcnet_fast.latency.measure import fastest_convolutions
from lgcnet_fast.latency.regression import Array
from lgcnet_fast.latency.table import Provenance
from lgcnet_fast.latency.timing import Frame, back_to_back_ms
from lgcnet_fast.parallel import Enough, all_of_them
from lgcnet_fast.space.base import LutKey, SearchSpace
from lgcnet_fast.space.genotype import Genotype

COLLECT_EVERY = 16
"""Networks between two collections of what they have left in memory."""


Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Progress that nobody wants to see."""


class Measurable(Protocol):
    """Something that times a network of one space, input size and number of classes."""

    def provenance(self) -> Provenance: ...

    def prepare(
        self, genotypes: Sequence[Genotype], progress: Progress, enough: Enough = all_of_them
    ) -> int:
        """Does once what would otherwise slow down every measurement, such as compiling.

        How many of the genotypes, from the first on, are ready when all are, or when this is
        `enough`. `progress` is called with this number, as it grows, and that of all.
        """
        ...

    def milliseconds(self, genotype: Genotype) -> float:
        """Of one image, back to back."""
        ...


@dataclass
class FrameTimer:
    """Builds the frame of a genotype, with random weights, and times it."""

    build: Callable[[Genotype], Frame]
    device: torch.device
    made_on: Provenance
    prepared: Callable[[Sequence[Genotype], Progress, Enough], int] | None = None
    """Makes the frames of genotypes quick to build, see `Measurable.prepare`."""
    measured: int = 0

    def provenance(self) -> Provenance:
        return self.made_on

    def prepare(
        self, genotypes: Sequence[Genotype], progress: Progress, enough: Enough = all_of_them
    ) -> int:
        if self.prepared is None:
            return len(genotypes)
        return self.prepared(genotypes, progress, enough)

    def milliseconds(self, genotype: Genotype) -> float:
        with fastest_convolutions():
            frame = self.build(genotype)
            milliseconds = back_to_back_ms(frame, self.device) / self.made_on.batch
        del frame
        self.measured += 1
        if self.measured % COLLECT_EVERY == 0:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return milliseconds


@torch.no_grad()
def entry_counts(
    space: SearchSpace,
    keys: Sequence[LutKey],
    genotypes: Sequence[Genotype],
    size: tuple[int, int],
    num_classes: int,
) -> Array:
    """How often each genotype pays for each entry: (genotypes, keys).

    Every space predicts a latency that is linear in its table, so an entry of 1 ms in a table of
    zeros tells its count.
    """
    choices = [space.one_hot(genotype) for genotype in genotypes]
    counts = np.zeros((len(genotypes), len(keys)))
    for column, key in enumerate(keys):
        table = dict.fromkeys(keys, 0.0) | {key: 1.0}
        model = space.latency_model(table, size, num_classes)
        counts[:, column] = [float(model(z).total) for z in choices]
    return counts
