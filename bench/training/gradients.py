"""Whether a step is right: its loss and gradients against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FACTORS = {"loss": 2.0, "weights": 2.0, "architecture": 3.0}
"""How much less exact ours may be than plain PyTorch in the same precision. Gradients of the
architecture are sums of terms that cancel, so that their errors vary more."""
SLACK = 1e-4
"""Relative error that is right in any case."""
LOSS_SLACK = {"fp32": SLACK, "fp16": 2**-11, "bf16": 2**-8}
"""The same of the loss, by precision: a rounding. It is a single number, whose error in one form is
often many times that in another by chance: of two that are alike, more than twice in 3 of 10."""


@dataclass(frozen=True)
class Gradients:
    """Float64 vectors by name, the loss among them."""

    vectors: dict[str, Tensor]

    @classmethod
    def of(cls, loss: Tensor, **parameters: Iterable[nn.Parameter]) -> Gradients:
        vectors = {"loss": loss.detach().double().reshape(1)}
        for name, group in parameters.items():
            vectors[name] = torch.cat(
                [
                    torch.zeros(p.numel(), dtype=torch.float64, device=p.device)
                    if p.grad is None
                    else p.grad.double().flatten()
                    for p in group
                ]
            )
        return cls(vectors)

    def errors(self, truth: Gradients) -> dict[str, float]:
        """Relative to the truth."""
        return {
            name: ((self.vectors[name] - exact).norm() / exact.norm()).item()
            for name, exact in truth.vectors.items()
        }


def judge(ours: dict[str, float], stock: dict[str, float], precision: str) -> list[str]:
    """One line for every vector of ours that is less exact than it has to be."""
    faults = []
    for name, error in ours.items():
        limit = FACTORS[name] * stock[name] + (LOSS_SLACK[precision] if name == "loss" else SLACK)
        if not error <= limit:
            faults.append(
                f"{name}: relative error {error:.2e}, plain PyTorch has {stock[name]:.2e}"
            )
    return faults
