"""Gradients of a map whose last launch can add those that come from elsewhere.

That launch is put off until all gradients of the map are there, see fan_out.py. Whoever else
reads such a gradient, autograd for one, has it computed without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class DeferredGradient(Tensor):
    """A gradient of a map, like it: computed when an operation of PyTorch or a kernel reads it."""

    computed_for: int | None
    _compute: Callable[[Sequence[Tensor]], Tensor]
    _alone: Tensor | None

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        compute: Callable[[Sequence[Tensor]], Tensor],
        computed_for: int | None = None,
    ) -> DeferredGradient:
        """compute: gives the gradient and these others of the map, summed; like: it, NHWC.

        What `compute` reads must not be freed before the gradient is, nor on another stream.
        computed_for: the map's storage, if the gradient is there already and others are added in
        its place. Maps that are summed share a gradient, which must stay as it is for them.
        """
        deferred: DeferredGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        deferred.computed_for, deferred._compute, deferred._alone = computed_for, compute, None
        return deferred

    def plus(self, others: Sequence[Tensor]) -> Tensor:
        """With other gradients of the map, which are like it."""
        return self._compute(others)

    def alone(self) -> Tensor:
        """Computed by the first call."""
        if self._alone is None:
            self._alone = self._compute([])
        return self._alone

    def data_ptr(self) -> int:
        return self.alone().data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(DeferredGradient, DeferredGradient.alone, (args, kwargs or {}))
        return operation(*args, **kwargs)
