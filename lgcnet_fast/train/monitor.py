"""Collapse monitor: what the architecture parameters say after each epoch of the search."""

from __future__ import annotations

import torch

from lgcnet_fast.space.base import Arch, ArchGroup, LatencyModel


def masked(arch: Arch, groups: tuple[ArchGroup, ...]) -> Arch:
    """The logits with minus infinity where a row lacks an option."""
    result = dict(arch)
    for group in groups:
        if group.mask is not None:
            logits = arch[group.name]
            allowed = torch.tensor(group.mask, device=logits.device)
            result[group.name] = logits.masked_fill(~allowed, float("-inf"))
    return result


def probabilities(arch: Arch, groups: tuple[ArchGroup, ...]) -> Arch:
    """softmax(alpha') of every row."""
    return {name: logits.softmax(-1) for name, logits in masked(arch, groups).items()}


@torch.no_grad()
def inspect(arch: Arch, groups: tuple[ArchGroup, ...], latency: LatencyModel) -> dict[str, float]:
    """Shares of argmax choices, mean entropy (nats a row) and expected latency (milliseconds).

    The shares of `none`, `skip` and light options are over the rows of groups that have any.
    """
    arch = masked({name: logits.detach().cpu().float() for name, logits in arch.items()}, groups)
    chosen = []
    for group in groups:
        if group.light:
            picks = arch[group.name].argmax(-1).tolist()
            chosen += [(group.options[pick], group.options[pick] in group.light) for pick in picks]
    soft = probabilities(arch, groups)
    entropies = torch.cat([torch.special.entr(p).sum(-1) for p in soft.values()])
    rows = max(len(chosen), 1)
    return {
        "share_none": sum(option == "none" for option, _ in chosen) / rows,
        "share_skip": sum(option == "skip" for option, _ in chosen) / rows,
        "share_light": sum(light for _, light in chosen) / rows,
        "entropy": float(entropies.mean()),
        "expected_ms": float(latency(soft).total),
    }
