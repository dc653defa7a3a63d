"""Stacks of the weights of depthwise-separable branches, made for a whole network in one launch.

An operation can stack its weights by itself, in two launches that nothing runs beside. Inside
`packed_weights` it finds the stacks made at the beginning of the pass: those that operations have
asked for in an earlier pass of the network. Weights are known by their addresses, so that copies
which share a parameter's memory are served too, and a parameter that has moved is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lgcnet_fast.ops.backend import Implementation, Operation, supposing
from lgcnet_fast.ops.maps import computed_dtype

Stack = tuple[Any, ...]
"""The shape of its weights and their addresses."""


class _Kind(NamedTuple):
    """Of a pass through a network."""

    device: torch.device
    weights: torch.dtype
    products: torch.dtype


class _Plan:
    """The stacks of a pass."""

    def __init__(self, asked: dict[Stack, list[Tensor]], products: torch.dtype) -> None:
        from lgcnet_fast.kernels.weight_stacks import WeightStacks

        self._names = list(asked)
        self._stacks, self._products = WeightStacks(list(asked.values())), products
        # Compiles the kernel, which cannot be recorded in a graph.
        self.filled()

    def filled(self) -> dict[Stack, Tensor]:
        return dict(zip(self._names, self._stacks.filled(self._products), strict=True))


class _Pass:
    """What there is for the operations of a pass, and what they ask for."""

    def __init__(self, kind: _Kind, plan: _Plan | None) -> None:
        self.kind = kind
        self.stacks = {} if plan is None else plan.filled()
        self.asked: dict[Stack, list[Tensor]] = {}

    def stack(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        if any(not self._is_known(weight) for weight in weights):
            return None
        if dtype != (self.kind.weights if _is_window(weights[0]) else self.kind.products):
            return None
        name = (weights[0].shape, *(weight.data_ptr() for weight in weights))
        self.asked[name] = list(weights)
        return self.stacks.get(name)

    def _is_known(self, weight: Tensor) -> bool:
        """Whether the kernel could read it."""
        own = (weight.device, weight.dtype)
        return own == (self.kind.device, self.kind.weights) and weight.is_contiguous()


_plans: WeakKeyDictionary[nn.Module, dict[_Kind, _Plan]] = WeakKeyDictionary()
_recorded: WeakKeyDictionary[nn.Module, list[_Plan | None]] = WeakKeyDictionary()
"""Plans that CUDA graphs go on using, whatever comes after them."""
_here: ContextVar[_Pass | None] = ContextVar("packed_weights", default=None)


@contextmanager
def packed_weights(network: nn.Module) -> Iterator[None]:
    """For a forward pass of `network`, whose own parameters are in place and do not change.

    The first pass finds out what to stack, in every dtype of its own, and so does one that asks
    for more than the one before. A pass that is captured in a CUDA graph finds out nothing.
    """
    first = next(network.parameters(), None)
    if first is None or supposing() or not _packs(first):
        yield
        return
    kind = _Kind(first.device, first.dtype, computed_dtype(first))
    plans = _plans.setdefault(network, {})
    here = _Pass(kind, plans.get(kind))
    token = _here.set(here)
    try:
        yield
    finally:
        _here.reset(token)
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        _recorded.setdefault(network, []).append(plans.get(kind))
    elif not here.asked.keys() <= here.stacks.keys():
        plans[kind] = _Plan(here.asked, kind.products)


def packed(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Windows (C, 1, 3, 3) as (B, 3, 3, C), or matrices (C_out, C, 1, 1) as (B, C_out, C).

    In `dtype`, with the values from the beginning of the pass. None where nothing is prepared.
    """
    here = _here.get()
    return None if here is None else here.stack(weights, dtype)


def _is_window(weight: Tensor) -> bool:
    return weight.shape[2:] == (3, 3)


def _form(serves: bool) -> Implementation:
    return Implementation(lambda weight: serves, lambda weight: None)


_packs = Operation(
    "packed_weights",
    lambda weight: False,
    triton=_form(True),
    cuda=_form(False),
    tuned_as="separable_branches",
)
"""Whether operations on weights like this ask for stacks that the kernel can make."""
