"""Tables of whole engines: what each operation adds, from the times of random networks.

An engine fuses what it can, so the time of an operation alone says little about what it adds. The
entries are instead fitted to the times of whole networks (design.py tells which).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lgcnet_fast.latency.design import fitting_genotypes
from lgcnet_fast.latency.genotypes import fingerprint
from lgcnet_fast.latency.networks import Measurable, Progress, entry_counts, silent
from lgcnet_fast.latency.regression import FOLDS, Array, FittedCosts, cross_validate, fit_costs
from lgcnet_fast.latency.roofline import roofline_ms
from lgcnet_fast.latency.table import Entry, Fit, LookupTable, make_entry
from lgcnet_fast.parallel import Enough
from lgcnet_fast.space.base import LutKey, SearchSpace
from lgcnet_fast.space.genotype import Genotype


@dataclass(frozen=True)
class FitEffort:
    networks: int = 320
    bases: int = 16
    """Networks that provide the combinations of operations of most others."""
    preparation_seconds: float = 80.0
    """Compiling ends then, if enough networks are ready."""
    fewest_ready: int = 120
    """About as many as a table has entries."""
    most_seconds: float = 130.0
    """Measuring ends so long after the beginning, with the networks so far."""
    fewest: int = 2 * FOLDS
    """Networks, however long they take."""


FULL_FIT = FitEffort()


def build_engine_table(
    space: SearchSpace,
    size: tuple[int, int],
    num_classes: int,
    timer: Measurable,
    effort: FitEffort = FULL_FIT,
    progress: Progress = silent,
) -> LookupTable:
    """Fits the entries of `space` at input `size` to networks that `timer` measures.

    `progress` is called with the number of networks so far and of all, while they are prepared and
    again while they are measured. An interrupt ends measuring, as time does.
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
    space: SearchSpace, timer: Measurable, effort: FitEffort, progress: Progress
) -> tuple[list[Genotype], Array]:
    started = time.perf_counter()

    def at_least(fewest: int, seconds: float) -> Enough:
        return lambda done: done >= fewest and time.perf_counter() - started > seconds

    genotypes = fitting_genotypes(space, effort.bases, effort.networks)
    ready = timer.prepare(
        genotypes, progress, at_least(effort.fewest_ready, effort.preparation_seconds)
    )
    enough = at_least(effort.fewest, effort.most_seconds)
    measured: list[float] = []
    for genotype in genotypes[:ready]:
        if enough(len(measured)):
            break
        try:
            measured.append(timer.milliseconds(genotype))
        except KeyboardInterrupt:
            if len(measured) < effort.fewest:
                raise
            break
        progress(len(measured), ready)
    return list(genotypes[: len(measured)]), np.array(measured)


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
