"""Predicted against measured latency, on networks that no table was fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from lgcnet_fast.errors import TableError
from lgcnet_fast.latency.genotypes import fingerprint, uniform_genotypes, varied_genotypes
from lgcnet_fast.latency.networks import Measurable, Progress, silent
from lgcnet_fast.latency.regression import spearman
from lgcnet_fast.latency.table import LookupTable, Provenance
from lgcnet_fast.space.base import SearchSpace
from lgcnet_fast.space.genotype import Genotype

CHECK_SEEDS = (1001, 1002)
UNIFORM = "uniform"
VARIED = "varied light share"
GIVEN = "given"
TRIES = 200
"""Genotypes in a row that a table may have been fitted to."""


@dataclass(frozen=True)
class CheckedNetwork:
    """Milliseconds of one image."""

    name: str
    predicted_ms: float
    constant_ms: float
    """The part of the prediction that no choice changes."""
    measured_ms: float

    @property
    def error(self) -> float:
        return abs(self.predicted_ms / self.measured_ms - 1)

    @property
    def searchable_error(self) -> float:
        """Of what is left without the constant part, on both sides; inf if nothing is left."""
        left = self.measured_ms - self.constant_ms
        return abs((self.predicted_ms - self.constant_ms) / left - 1) if left > 0 else float("inf")


@dataclass(frozen=True)
class LatencyCheck:
    """Groups of networks by what they are: uniform, varied, given."""

    table: Provenance
    measured_on: Provenance
    groups: Mapping[str, tuple[CheckedNetwork, ...]]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Of each group: networks, errors in percent, rank correlation."""
        return {name: _summary(networks) for name, networks in self.groups.items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "table": self.table.model_dump(mode="json"),
            "measured_on": self.measured_on.model_dump(mode="json"),
            "summary": self.summary(),
            "networks": {
                name: [asdict(network) for network in networks]
                for name, networks in self.groups.items()
            },
        }


def check_predictions(
    table: LookupTable,
    space: SearchSpace,
    timer: Measurable,
    count: int = 50,
    given: Mapping[str, Genotype] | None = None,
    progress: Progress = silent,
) -> LatencyCheck:
    """Measures `count` uniform genotypes, as many of varied lightness, and the given ones by name.

    Varied lightness is a share of light operations from 0.1 to 0.9. None of the random ones is
    among those that the table was fitted to. `progress` is called with the number of networks so
    far and of all, while they are prepared and again while they are measured; an interrupt then
    ends with those of them that are measured. Raises `TableError` if the table is not one of
    `space`, and `GenotypeError` for a given genotype of another space.
    """
    uniform, varied = CHECK_SEEDS
    groups = {
        UNIFORM: _named(_unseen(uniform_genotypes(space, uniform), table), count),
        VARIED: _named(_unseen(varied_genotypes(space, varied), table), count),
        **({GIVEN: given} if given else {}),
    }
    predicted = {name: _predictions(table, space, members) for name, members in groups.items()}
    everything = [genotype for members in groups.values() for genotype in members.values()]
    timer.prepare(everything, progress)
    total = sum(map(len, groups.values()))
    checked: dict[str, list[CheckedNetwork]] = {name: [] for name in groups}
    for done, (group, name) in enumerate(_members(groups), start=1):
        try:
            milliseconds = timer.milliseconds(groups[group][name])
        except KeyboardInterrupt:
            if done == 1:
                raise
            break
        terms = predicted[group][name]
        checked[group].append(CheckedNetwork(name, *terms, measured_ms=milliseconds))
        progress(done, total)
    networks = {name: tuple(members) for name, members in checked.items() if members}
    return LatencyCheck(table.made_on, timer.provenance(), networks)


@torch.no_grad()
def _predictions(
    table: LookupTable, space: SearchSpace, genotypes: Mapping[str, Genotype]
) -> dict[str, tuple[float, float]]:
    """Whole and constant milliseconds by name."""
    model = space.latency_model(table.milliseconds, table.size, table.num_classes)
    terms = {name: model(space.one_hot(genotype)) for name, genotype in genotypes.items()}
    return {name: (float(term.total), float(term.constant)) for name, term in terms.items()}


def _members(groups: Mapping[str, Mapping[str, Genotype]]) -> list[tuple[str, str]]:
    return [(group, name) for group, members in groups.items() for name in members]


def _unseen(genotypes: Iterator[Genotype], table: LookupTable) -> Iterator[Genotype]:
    """Ends where hardly any genotype is left that the table was not fitted to."""
    seen = set(table.fit.genotypes) if table.fit else set()
    tries = 0
    for genotype in genotypes:
        tries += 1
        if fingerprint(genotype) not in seen:
            tries = 0
            yield genotype
        elif tries == TRIES:
            raise TableError(
                "the latency table was fitted to nearly every genotype of its space, so none are "
                "left to check it with"
            )


def _named(genotypes: Iterable[Genotype], count: int) -> dict[str, Genotype]:
    return {str(number): genotype for number, genotype in enumerate(islice(genotypes, count))}


def _summary(networks: tuple[CheckedNetwork, ...]) -> dict[str, Any]:
    whole = np.array([network.error for network in networks])
    searchable = np.array([network.searchable_error for network in networks])
    predicted = np.array([network.predicted_ms for network in networks])
    measured = np.array([network.measured_ms for network in networks])
    return {
        "networks": len(networks),
        "median_error_pct": _percent(np.median(whole)),
        "worst_error_pct": _percent(whole.max()),
        "searchable_median_error_pct": _percent(np.median(searchable)),
        "searchable_worst_error_pct": _percent(searchable.max()),
        "rank_correlation": _finite(spearman(predicted, measured)),
    }


def _percent(share: float) -> float | None:
    return _finite(100 * float(share))


def _finite(value: float) -> float | None:
    """JSON has neither inf nor nan."""
    return value if np.isfinite(value) else None
