"""Running statistics of batch norms whose batch statistics come from elsewhere, in few launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lgcnet_fast.ops.lanes import in_background

_Update = tuple[Sequence[nn.BatchNorm2d], Tensor, Tensor, int]
_gathered: ContextVar[list[_Update] | None] = ContextVar("running_statistics", default=None)


@contextmanager
def gathered_running_statistics() -> Iterator[None]:
    """Updates the running statistics of a whole network at the end of the `with` block.

    Together they take a few multi-tensor launches instead of some a node. A forward pass that
    fails leaves them as they were.
    """
    updates: list[_Update] = []
    token = _gathered.set(updates)
    try:
        yield
    finally:
        _gathered.reset(token)
    if updates:
        in_background(updates[0][1].device, partial(_apply, updates))


def update_running_statistics(
    norms: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor, count: int
) -> None:
    """As `nn.BatchNorm2d` does in training.

    mean, variance (biased): (K, C), of `count` values a channel, in the dtype of the running ones.
    """
    update = (norms, mean, variance, count)
    gathered = _gathered.get()
    if gathered is None:
        _apply([update])
    else:
        gathered.append(update)


@torch.no_grad()
def _apply(updates: Sequence[_Update]) -> None:
    """running = (1 - momentum) running + momentum batch, the variance unbiased."""
    by_momentum: dict[Any, list[_Update]] = defaultdict(list)
    for update in updates:
        by_momentum[update[0][0].momentum].append(update)
    for momentum, group in by_momentum.items():
        norms = [norm for update in group for norm in update[0]]
        running: list[Any] = [norm.running_mean for norm in norms]
        running += [norm.running_var for norm in norms]
        torch._foreach_mul_(running, 1 - momentum)
        means = [row for _, mean, _, _ in group for row in mean.unbind()]
        torch._foreach_add_(running[: len(norms)], means, alpha=momentum)
        _add_variances(group, momentum)
        counts: list[Any] = [norm.num_batches_tracked for norm in norms]
        torch._foreach_add_(counts, 1)


def _add_variances(updates: Sequence[_Update], momentum: float) -> None:
    """One launch for all norms over the same number of values."""
    by_count: dict[int, tuple[list[Any], list[Tensor]]] = defaultdict(lambda: ([], []))
    for norms, _, variance, count in updates:
        running, batch = by_count[count]
        running += [norm.running_var for norm in norms]
        batch += variance.unbind()
    for count, (running, batch) in by_count.items():
        torch._foreach_add_(running, batch, alpha=momentum * count / (count - 1))
