"""The last step towards a latency target: genotypes of alpha' - price * latency.

The controller leads the search to the target, but the argmax moves in steps of whole operations.
A common price on every option's latency is the exchange rate between logits and milliseconds;
it is found by bisection, so that as few and as cheap choices as possible are changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lgcnet_fast.errors import RunError
from lgcnet_fast.latency.predict import option_costs
from lgcnet_fast.space.base import Arch, SearchSpace
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.space.sampling import masked, probabilities
from lgcnet_fast.train.prediction import LatencyPredictor

TOLERANCE = 0.05
SMALLEST_PRICE = 1e-3
"""Logits a millisecond; the first price tried."""
DOUBLINGS = 60
BISECTIONS = 50

Derived = tuple[Genotype, tuple[str, ...]]


@dataclass(frozen=True)
class _Attempt:
    price: float
    arch: Arch
    """alpha' - price * latency."""
    genotype: Genotype
    ratio: float
    """Predicted latency by target."""

    def miss(self) -> float:
        return abs(self.ratio - 1)


def within_target(
    space: SearchSpace, arch: Arch, predictor: LatencyPredictor, target_ms: float
) -> Derived:
    """The genotype nearest to the argmax of `arch` whose latency is within 5 % of the target.

    Returns it with one line for each choice that differs from the argmax. Raises `RunError` if
    no price and no single change after it comes close enough.
    """
    genotype, changes = space.discretise(arch)
    if _error(predictor, genotype, target_ms) <= TOLERANCE:
        return genotype, changes
    closest = _bisect(space, arch, predictor, target_ms)
    priced = closest.genotype
    if closest.miss() > TOLERANCE:
        priced = _change_one_row(space, closest.arch, predictor, target_ms)
    reason = f"price {closest.price:.4g} a millisecond, target {target_ms:g} ms"
    return priced, (*changes, *_choices(space, genotype, priced, reason))


def _bisect(
    space: SearchSpace, arch: Arch, predictor: LatencyPredictor, target_ms: float
) -> _Attempt:
    """The closest attempt: doubles the price until the latency crosses the target, then halves."""
    costs = option_costs(predictor.model, probabilities(arch, space.arch_groups()))

    def attempt(price: float) -> _Attempt:
        priced = {name: arch[name] - price * costs[name] for name in arch}
        genotype, _ = space.discretise(priced)
        return _Attempt(price, priced, genotype, predictor.milliseconds(genotype) / target_ms)

    closest = attempt(0.0)
    too_slow = closest.ratio > 1
    near, far = 0.0, SMALLEST_PRICE if too_slow else -SMALLEST_PRICE
    for _ in range(DOUBLINGS):
        tried = attempt(far)
        closest = min(closest, tried, key=_Attempt.miss)
        if (tried.ratio > 1) != too_slow:
            break
        near, far = far, 2 * far
    for _ in range(BISECTIONS):
        middle = (near + far) / 2
        tried = attempt(middle)
        closest = min(closest, tried, key=_Attempt.miss)
        near, far = (middle, far) if (tried.ratio > 1) == too_slow else (near, middle)
    return closest


def _change_one_row(
    space: SearchSpace, arch: Arch, predictor: LatencyPredictor, target_ms: float
) -> Genotype:
    """The cheapest change of one row of `arch` that meets the target."""
    for changed in _single_changes(space, arch):
        genotype, _ = space.discretise(changed)
        if _error(predictor, genotype, target_ms) <= TOLERANCE:
            return genotype
    genotype, _ = space.discretise(arch)
    raise RunError(
        f"search.latency_target_ms = {target_ms}: the nearest genotype found has "
        f"{predictor.milliseconds(genotype):.3f} ms, more than 5 % away; choose a target near it"
    )


def _single_changes(space: SearchSpace, arch: Arch) -> Iterator[Arch]:
    """`arch` with one row's choice replaced, in the order of the logit given up."""
    changes = []
    for name, logits in masked(arch, space.arch_groups()).items():
        loss = logits.max(-1, keepdim=True).values - logits
        rows, options = torch.nonzero((loss > 0) & loss.isfinite(), as_tuple=True)
        for row, option in zip(rows.tolist(), options.tolist(), strict=True):
            changes.append((float(loss[row, option]), name, row, option))
    for _, name, row, option in sorted(changes):
        logits = arch[name].clone()
        logits[row, option] = logits[row].max() + 1
        yield {**arch, name: logits}


def _choices(space: SearchSpace, before: Genotype, after: Genotype, reason: str) -> list[str]:
    """One line for each row in which two genotypes differ."""
    lines = []
    old, new = space.one_hot(before), space.one_hot(after)
    for group in space.arch_groups():
        picks = zip(group.rows, old[group.name].argmax(-1), new[group.name].argmax(-1), strict=True)
        for row, was, now in picks:
            if was != now:
                lines.append(f"{row}: {group.options[was]} -> {group.options[now]} ({reason})")
    return lines


def _error(predictor: LatencyPredictor, genotype: Genotype, target_ms: float) -> float:
    return abs(predictor.milliseconds(genotype) / target_ms - 1)
