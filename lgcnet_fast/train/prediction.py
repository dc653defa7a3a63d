"""Latency as the stages use it: the run's table, its model, its scale, a target's range."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lgcnet_fast.config import SearchConfig
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.space.base import Arch, LatencyModel, SearchSpace
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.train.monitor import probabilities
from lgcnet_fast.train.run import Run


@dataclass(frozen=True)
class LatencyPredictor:
    """Predicted latency of a space's networks, in the milliseconds of one table."""

    space: SearchSpace
    model: LatencyModel
    """Moves to the training device with the search network."""
    model_on_cpu: LatencyModel
    scale: float
    """Multiplier that brings this device's milliseconds to the paper's device (section 1.1)."""
    description: str
    """Device, runtime and numeric type of the table."""

    @torch.no_grad()
    def milliseconds(self, genotype: Genotype) -> float:
        """Whole network, constant part included."""
        return float(self.model_on_cpu(self.space.one_hot(genotype)).total)

    def reachable(self) -> tuple[float, float]:
        """Milliseconds of the fastest and of the slowest valid genotype."""
        uniform = {
            group.name: torch.ones(len(group.rows), len(group.options))
            for group in self.space.arch_groups()
        }
        costs = option_costs(uniform, self.space, self.model_on_cpu)
        fastest, _ = self.space.discretise({name: -cost for name, cost in costs.items()})
        slowest, _ = self.space.discretise(costs)
        return self.milliseconds(fastest), self.milliseconds(slowest)


def option_costs(arch: Arch, space: SearchSpace, model: LatencyModel) -> Arch:
    """Milliseconds that each option adds: the gradient of the latency in Z, at softmax(alpha').

    Exact for spaces whose latency is linear in Z, such as LGCNet's.
    """
    soft = probabilities(arch, space.arch_groups())
    z = {name: p.clone().requires_grad_() for name, p in soft.items()}
    total = model(z).total
    gradients = torch.autograd.grad(total, list(z.values()), allow_unused=True)
    return {
        name: torch.zeros_like(z[name]) if gradient is None else gradient
        for name, gradient in zip(z, gradients, strict=True)
    }


def latency_predictor(run: Run) -> LatencyPredictor:
    raise NotImplementedError


def check_target(config: SearchConfig, predictor: LatencyPredictor) -> None:
    """Raises `ConfigError` with the range if no network of the space has the target's latency."""
    target = config.latency_target_ms
    if target is None:
        return
    fastest, slowest = predictor.reachable()
    if not fastest <= target <= slowest:
        raise ConfigError(
            f"search.latency_target_ms = {target}: this space's networks take {fastest:.3f} to "
            f"{slowest:.3f} ms on {predictor.description}; choose a target in that range"
        )
