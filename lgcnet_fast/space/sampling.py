"""Gumbel-softmax samples of the architecture (LGCNet equation 4)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lgcnet_fast.space.base import Arch, ArchGroup


def gumbel_softmax(
    arch: Arch,
    temperature: float,
    generator: torch.Generator | None = None,
    groups: Sequence[ArchGroup] = (),
) -> Arch:
    """Z = softmax((alpha' + G) / temperature) for each row, float32, differentiable.

    arch: group -> logits (rows, options). generator: on the logits' device. groups: their masks
    give 0 to options that a row does not have. G = -log(E) with E ~ Exponential(1), because
    -log(-log(U)) overflows where float32 rounds U to 1.
    """
    masks = {group.name: group.mask for group in groups if group.mask is not None}
    z = {}
    for name, logits in arch.items():
        precise = logits.float()
        if name in masks:
            precise = precise.masked_fill(~_mask(masks[name], logits.device), -torch.inf)
        waiting = torch.empty_like(precise).exponential_(generator=generator)
        noise = -waiting.clamp_(min=torch.finfo(torch.float32).tiny).log_()
        z[name] = ((precise + noise) / temperature).softmax(dim=-1)
    return z


@functools.lru_cache(maxsize=64)
def _mask(mask: tuple[tuple[bool, ...], ...], device: torch.device) -> Tensor:
    """Kept on the device, so that a search step copies nothing."""
    return torch.tensor(mask, device=device)
