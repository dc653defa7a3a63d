"""Probabilities and Gumbel-softmax samples of the architecture (LGCNet equation 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgcnet_fast.ops.constants import constant
from lgcnet_fast.space.base import Arch, ArchGroup


def gumbel_softmax(
    arch: Arch,
    temperature: float | Tensor,
    generator: torch.Generator | None = None,
    groups: Sequence[ArchGroup] = (),
) -> Arch:
    """Z = softmax((alpha' + G) / temperature) for each row, float32, differentiable.

    arch: group -> logits (rows, options). temperature: a number or, where a step is captured in a
    CUDA graph, a scalar tensor. generator: on the logits' device. groups: their masks give 0 to
    options that a row does not have. G = -log(E) with E ~ Exponential(1), because -log(-log(U))
    overflows where float32 rounds U to 1.
    """
    logits = masked(arch, groups)
    # All groups at once: the launches of such small matrices follow each other.
    flat = torch.cat([rows.flatten() for rows in logits.values()])
    waiting = torch.empty_like(flat).exponential_(generator=generator)
    noise = waiting.clamp_(min=torch.finfo(torch.float32).tiny).log_()
    scaled = ((flat - noise) / temperature).split([rows.numel() for rows in logits.values()])
    return {
        name: part.view_as(rows).softmax(dim=-1)
        for (name, rows), part in zip(logits.items(), scaled, strict=True)
    }


def probabilities(
    arch: Arch, groups: Sequence[ArchGroup] = (), temperature: float | Tensor = 1.0
) -> Arch:
    """softmax(alpha' / temperature) of every row, float32; near the argmax at low temperatures."""
    return {
        name: (logits / temperature).softmax(dim=-1)
        for name, logits in masked(arch, groups).items()
    }


def masked(arch: Arch, groups: Sequence[ArchGroup]) -> Arch:
    """The logits, float32, with minus infinity where a row lacks an option."""
    masks = {group.name: group.mask for group in groups if group.mask is not None}
    result = {name: logits.float() for name, logits in arch.items()}
    for name, mask in masks.items():
        allowed = constant(mask, result[name].device)
        result[name] = result[name].masked_fill(~allowed, -torch.inf)
    return result
