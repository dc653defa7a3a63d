"""Collapse monitor: what the architecture parameters say after each epoch of the search."""

from __future__ import annotations

import torch

from lgcnet_fast.space.base import Arch, ArchGroup, LatencyModel
from lgcnet_fast.space.sampling import probabilities


@torch.no_grad()
def inspect(arch: Arch, groups: tuple[ArchGroup, ...], latency: LatencyModel) -> dict[str, float]:
    """Shares of argmax choices, mean entropy (nats a row) and expected latency (milliseconds).

    `expected_ms` is the latency under softmax(alpha'), constant part included. The shares of
    `none`, `skip` and light options are over the rows of groups that have any.
    """
    soft = probabilities({name: logits.cpu() for name, logits in arch.items()}, groups)
    chosen = []
    for group in groups:
        if group.light:
            picks = soft[group.name].argmax(-1).tolist()
            chosen += [(group.options[pick], group.options[pick] in group.light) for pick in picks]
    entropies = torch.cat([torch.special.entr(p).sum(-1) for p in soft.values()])
    rows = max(len(chosen), 1)
    return {
        "share_none": sum(option == "none" for option, _ in chosen) / rows,
        "share_skip": sum(option == "skip" for option, _ in chosen) / rows,
        "share_light": sum(light for _, light in chosen) / rows,
        "entropy": float(entropies.mean()),
        "expected_ms": float(latency(soft).total),
    }
