"""A latency target in place of beta: a multiplier that follows the argmax latency."""

from __future__ import annotations

import torch
from torch import Tensor

from lgcnet_fast.space.base import Arch, LatencyModel

# In units of loss per e-fold change of latency; beta = 0.005 is 0.08 of them (section 1.1).
PROPORTIONAL = 3.0
INTEGRAL = 30.0
"""Reached by an error of one e-fold that lasts the whole search."""
LIMIT = 20.0


class LatencyController:
    """Proportional-integral controller of the signed latency multiplier, without synchronisation.

    The multiplier is positive while the argmax architecture is slower than the target, negative
    while it is faster; the integral part keeps what the target costs in the long run.
    """

    def __init__(self, target_ms: float, steps: int, device: torch.device) -> None:
        self.target_ms = target_ms
        self.steps = steps
        self.integral = torch.zeros((), device=device)
        self.last = torch.zeros((), device=device)
        """The newest multiplier, for the log."""

    def multiplier(self, argmax_ms: Tensor) -> Tensor:
        """Scalar; called once an optimiser step with the present argmax latency in milliseconds."""
        error = torch.log(argmax_ms.clamp(min=1e-6) / self.target_ms).clamp(-2, 2)
        self.integral.add_(error * (INTEGRAL / self.steps)).clamp_(-LIMIT, LIMIT)
        self.last = PROPORTIONAL * error + self.integral
        return self.last

    def state_dict(self) -> dict[str, Tensor]:
        return {"integral": self.integral}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.integral.copy_(state["integral"])


@torch.no_grad()
def argmax_latency(arch: Arch, model: LatencyModel) -> Tensor:
    """Total milliseconds of the largest logits, before any repair; stays on the device."""
    one_hot = {
        name: torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        for name, logits in arch.items()
    }
    return model(one_hot).total
