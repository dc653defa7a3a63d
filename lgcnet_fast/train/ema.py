"""Exponential moving average of a network's parameters and batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """Call `update_parameters(network)` after each step; `.module` is the averaged network.

    The first update copies the network. Unlike torch's it decides that on the device, so that it
    never waits and can be captured in a CUDA graph.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, next(network.parameters()).device, use_buffers=True)
        self.decay = decay
        self.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        for average, value in pairs:
            if not value.is_floating_point():
                average.copy_(value)
        floating = [pair for pair in pairs if pair[1].is_floating_point()]
        averages, values = zip(*floating, strict=True)
        kept = torch.where(self.n_averaged == 0, 0.0, self.decay)
        torch._foreach_mul_(averages, kept)
        torch._foreach_add_(averages, torch._foreach_mul(values, 1 - kept))
        self.n_averaged += 1


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return chain(network.parameters(), network.buffers())
