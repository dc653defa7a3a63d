"""What a table says about a space: a genotype's latency, the range, the scale of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lgcnet_fast.errors import ConfigError
from lgcnet_fast.space.base import Arch, LatencyModel, SearchSpace
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.space.sampling import masked, probabilities

PAPER_MEAN_MS = 16.2
"""Mean over uniform random architectures on the paper's device: 61.9 FPS, Table VII."""
SWEEPS = 20


@dataclass(frozen=True)
class LatencyRange:
    """The fastest and the slowest genotype of a space, milliseconds, constant part included."""

    low: float
    high: float


def uniform_arch(space: SearchSpace, device: torch.device | None = None) -> Arch:
    """Z in which every row's allowed options weigh the same."""
    groups = space.arch_groups()
    equal = {g.name: torch.zeros(len(g.rows), len(g.options), device=device) for g in groups}
    return probabilities(equal, groups)


@torch.no_grad()
def latency_scale(space: SearchSpace, model: LatencyModel) -> float:
    """The beta loss's multiplier: uniform random architectures average 16.2 ms by it.

    Their mean is the latency at uniform Z, because the rows are drawn independently and the
    latency is linear in each.
    """
    mean = float(model(uniform_arch(space, _device(model))).total)
    if mean <= 0:
        raise ConfigError("the latency table gives every architecture 0 ms; build it again")
    return PAPER_MEAN_MS / mean


@torch.no_grad()
def predict_ms(space: SearchSpace, model: LatencyModel, genotype: Genotype) -> float:
    """Predicted latency of a genotype, constant part included, in the table's milliseconds."""
    return float(model(_moved(space.one_hot(genotype), _device(model))).total)


def latency_range(space: SearchSpace, model: LatencyModel) -> LatencyRange:
    """Bounds of `predict_ms` over valid genotypes.

    Exact where the latency is linear in Z; where it is linear in each row only, the best found by
    changing all rows at once until nothing improves.
    """
    return LatencyRange(_extreme(space, model, 1.0), _extreme(space, model, -1.0))


def check_target(target_ms: float, reachable: LatencyRange) -> None:
    """Raises `ConfigError` naming the range if no genotype has the target's latency."""
    if not reachable.low <= target_ms <= reachable.high:
        raise ConfigError(
            f"search.latency_target_ms = {target_ms:g}: this space and table reach "
            f"{reachable.low:.3f} to {reachable.high:.3f} ms; choose a target in that range"
        )


def _extreme(space: SearchSpace, model: LatencyModel, sign: float) -> float:
    """Smallest (sign 1) or largest (sign -1) latency.

    An option's cost serves as its negative logit, so that making the genotype valid, too, takes
    the cheapest way.
    """
    z = uniform_arch(space, _device(model))
    best: float | None = None
    for _ in range(SWEEPS):
        logits = {name: -sign * costs for name, costs in option_costs(model, z).items()}
        genotype, _ = space.discretise(masked(logits, space.arch_groups()))
        found = predict_ms(space, model, genotype)
        if best is not None and sign * found >= sign * best:
            return best
        best = found
        z = _moved(space.one_hot(genotype), _device(model))
    assert best is not None
    return best


def option_costs(model: LatencyModel, z: Arch) -> Arch:
    """Milliseconds that each option adds: the gradient of the latency in Z, at `z`.

    The same at every `z` where the latency is linear in Z, as LGCNet's.
    """
    leaves = {name: weights.detach().clone().requires_grad_() for name, weights in z.items()}
    total = model(leaves).total
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _moved(arch: Arch, device: torch.device) -> Arch:
    return {name: weights.to(device) for name, weights in arch.items()}


def _device(model: LatencyModel) -> torch.device:
    return next(model.buffers()).device
