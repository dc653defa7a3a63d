"""Tables of whole engines: what each operation adds, from the times of random networks.

An engine fuses what it can, so the time of an operation alone says little about what it adds. The
entries are instead fitted to measured networks: half of them uniform, half with a share of light
operations from 0.1 to 0.9, so that small networks are known as well as average ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lgcnet_fast.latency.genotypes import fingerprint, uniform_genotypes, varied_genotypes
from lgcnet_fast.latency.networks import Measurable, entry_counts
from lgcnet_fast.latency.regression import FOLDS, Array, FittedCosts, cross_validate, fit_costs
from lgcnet_fast.latency.roofline import roofline_ms
from lgcnet_fast.latency.table import Entry, Fit, LookupTable, make_entry
from lgcnet_fast.space.base import LutKey, SearchSpace
from lgcnet_fast.space.genotype import Genotype

FIT_SEEDS = (1, 2)
"""Of the uniform genotypes and of those with a varied share of light operations."""


@dataclass(frozen=True)
class FitEffort:
    networks: int = 400
    most_seconds: float = 150.0
    """Measuring ends then, with the networks measured so far."""
    fewest: int = 2 * FOLDS
    """Networks, however long they take."""


FULL_FIT = FitEffort()


def build_engine_table(
    space: SearchSpace,
    size: tuple[int, int],
    num_classes: int,
    timer: Measurable,
    effort: FitEffort = FULL_FIT,
    progress: Callable[[int, int], None] | None = None,
) -> LookupTable:
    """Fits the entries of `space` at input `size` to networks that `timer` measures.

    `progress` is called with the number of networks so far and of all.
    """
    started = time.perf_counter()
    keys = tuple(dict.fromkeys(space.engine_keys(size, num_classes)))
    genotypes, measured = _measure(space, timer, effort, progress)
    counts = entry_counts(space, keys, genotypes, size, num_classes)
    prior = np.array([_prior_ms(space, key) for key in keys])
    scatter, errors = cross_validate(counts, measured, prior)
    return LookupTable(
        made_on=timer.provenance(),
        space=space.name,
        options=space.options.model_dump(mode="json"),
        size=size,
        num_classes=num_classes,
        entries=_entries(keys, fit_costs(counts, measured, prior, scatter), counts),
        fit=Fit(
            networks=len(genotypes),
            seconds=time.perf_counter() - started,
            median_error=float(np.median(errors)),
            worst_error=float(errors.max()),
            genotypes=tuple(fingerprint(genotype) for genotype in genotypes),
        ),
    )


def _measure(
    space: SearchSpace,
    timer: Measurable,
    effort: FitEffort,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Genotype], Array]:
    genotypes: list[Genotype] = []
    measured: list[float] = []
    drawn = _alternating(space)
    started = time.perf_counter()
    while len(genotypes) < effort.networks:
        late = time.perf_counter() - started > effort.most_seconds
        if late and len(genotypes) >= effort.fewest:
            break
        genotypes.append(next(drawn))
        measured.append(timer.milliseconds(genotypes[-1]))
        if progress is not None:
            progress(len(genotypes), effort.networks)
    return genotypes, np.array(measured)


def _alternating(space: SearchSpace) -> Iterator[Genotype]:
    uniform, varied = FIT_SEEDS
    pairs = zip(uniform_genotypes(space, uniform), varied_genotypes(space, varied), strict=True)
    return (genotype for pair in pairs for genotype in pair)


def _prior_ms(space: SearchSpace, key: LutKey) -> float:
    lut = space.lut_module(key)
    return roofline_ms(lut.module, lut.input_shapes)


def _entries(keys: Sequence[LutKey], fitted: FittedCosts, counts: Array) -> tuple[Entry, ...]:
    networks = np.count_nonzero(counts, axis=0)
    return tuple(
        make_entry(
            key,
            float(cost),
            spread=float(interval / cost) if cost > 0 else 0.0,
            runs=max(1, int(runs)),
        )
        for key, cost, interval, runs in zip(
            keys, fitted.costs, fitted.interval, networks, strict=True
        )
    )
