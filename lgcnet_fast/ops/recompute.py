"""Maps that are cheaper to compute again in the backward pass than to keep until then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lgcnet_fast.ops.backend import Implementation, Operation


@contextmanager
def recomputed(value: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Operations in the `with` block that would keep `value` for their backward pass call `again`.

    again: computes the same map, without gradients, from tensors that are kept anyway.
    """
    identity = _identity(value)

    def pack(kept: Tensor) -> Tensor | None:
        return None if _identity(kept) == identity else kept

    def unpack(kept: Tensor | None) -> Tensor:
        return again() if kept is None else kept

    with saved_tensors_hooks(pack, unpack):
        yield


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that show the same memory; also without data."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


class Rectified:
    """relu(x) for several functions, computed once.

    The fused form keeps x for the backward pass, which others keep too, and rectifies it again for
    every function; the reference keeps relu(x).
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._recomputes: bool = _recomputes(x)

    def __call__(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(relu(x))."""
        if not self._recomputes:
            return function(self._value)
        with recomputed(self._value, self._again):
            return function(self._value)

    @cached_property
    def _value(self) -> Tensor:
        if not self._recomputes:
            return F.relu(self.x)
        again = self._again
        with saved_tensors_hooks(lambda kept: None, lambda kept: again()):
            return F.relu(self.x)

    @property
    def _again(self) -> Callable[[], Tensor]:
        x = self.x.detach()
        return lambda: F.relu(x)


_form = Implementation(lambda x: True, lambda x: None)
_recomputes = Operation(
    "rectified", lambda x: False, triton=_form, cuda=_form, tuned_as="separable_branches"
)
