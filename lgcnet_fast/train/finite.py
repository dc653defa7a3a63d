"""Stops a stage whose numbers are no longer finite, before they reach a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import nn

from lgcnet_fast.errors import RunError


def require_finite(loss: float, stage: str, epoch: int, step: int, remedy: str) -> None:
    """Raises `RunError` naming what to try if `loss` is NaN or infinite."""
    if not math.isfinite(loss):
        raise RunError(
            f"{stage}: the loss became {loss} in epoch {epoch + 1} (by step {step + 1}); {remedy}. "
            f"{_kept(epoch)}"
        )


@torch.no_grad()
def require_finite_parameters(network: nn.Module, stage: str, epoch: int, remedy: str) -> None:
    """Raises `RunError` if a parameter is NaN or infinite; waits for the device once."""
    norms = torch._foreach_norm(list(network.parameters()))
    if not bool(torch.stack(norms).isfinite().all()):
        raise RunError(
            f"{stage}: a parameter became NaN or infinite in epoch {epoch + 1}; {remedy}. "
            f"{_kept(epoch)}"
        )


def _kept(epoch: int) -> str:
    if epoch == 0:
        return "There is no checkpoint of a whole epoch yet."
    return f"The checkpoint of epoch {epoch} is kept."
