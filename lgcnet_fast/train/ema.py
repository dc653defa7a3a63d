"""Exponential moving average of a network's parameters and batch-norm statistics."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Call `update_parameters(network)` after each step; `.module` is the averaged network."""
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return averaged.eval()
