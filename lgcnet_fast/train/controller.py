"""A latency target in place of beta: a multiplier that leads the latency to the target.

The controller looks at the latency under softmax(alpha' / temperature). In the beginning, at
temperature 1, that is the mean of what is sampled; towards the end it is the argmax latency. Steps
of whole operations, and of cells whose edges the graph-guided module moves together, reach the
multiplier as slopes: following the argmax itself swung it by more than the search's own gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In units of loss per e-fold change of latency. The paper's beta = 0.005 is 0.08 of them, and at
# beta = 0.05, 0.8 of them, its latency hardly falls any more.
PROPORTIONAL = 1.0
INTEGRAL = 5.0
"""Reached by an error of one e-fold that lasts the whole search. Four times as much made the
latency of short searches swing about the target, and every operation with it."""
LIMIT = 3.0
"""Of the integral part: more would drown the cross entropy, above all in short searches, whose
logits cannot move far."""


class LatencyController:
    """Proportional-integral controller of the signed latency multiplier, without synchronisation.

    Its numbers stay where they are, so that a step with it can be captured in a CUDA graph.

    The multiplier is positive while the architecture is slower than the target, negative while it
    is faster; the integral part keeps what the target costs in the long run.
    """

    def __init__(self, target_ms: float, steps: int, device: torch.device) -> None:
        self.target_ms = target_ms
        self.steps = steps
        self.integral = torch.zeros((), device=device)
        self.last = torch.zeros((), device=device)
        """The newest multiplier, for the log."""

    def multiplier(self, milliseconds: Tensor) -> Tensor:
        """Scalar; called once an optimiser step with the latency at the present temperature."""
        error = torch.log(milliseconds.clamp(min=1e-6) / self.target_ms).clamp(-2, 2)
        self.integral.add_(error * (INTEGRAL / self.steps)).clamp_(-LIMIT, LIMIT)
        self.last.copy_(PROPORTIONAL * error + self.integral)
        return self.last

    def state_dict(self) -> dict[str, Tensor]:
        return {"integral": self.integral}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.integral.copy_(state["integral"])
