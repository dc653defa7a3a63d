"""Maps that are cheaper to compute again in the backward pass than to keep until then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lgcnet_fast.ops.backend import Implementation, Operation, current_backend, use_backend
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal

Recomputable = tuple[Tensor, Callable[[], Tensor]]
"""A map, and how to compute it again: without gradients, from tensors that are kept anyway.

If several operations keep the map, the way should be `Remembered`."""


class Remembered:
    """A map that several operations keep, computed when the first asks for it.

    It is let go of as soon as all of them have asked, not with the graph of the backward pass,
    which may outlive them.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """The map: function(x)."""
        self._compute = partial(function, x.detach())
        self._value: Tensor | None = None
        self._keepers = 0

    def kept_once_more(self) -> None:
        self._keepers += 1

    def __call__(self) -> Tensor:
        value = self._compute() if self._value is None else self._value
        self._keepers -= 1
        # A second pass through the graph asks more often than the map was kept.
        self._value = value if self._keepers > 0 else None
        return value


@contextmanager
def recomputed(*maps: Recomputable) -> Iterator[None]:
    """What operations in the `with` block need of these maps for their backward pass is computed
    again there, not kept, by the backend of the `with` block. Blocks do not nest.
    """
    if not maps:
        yield
        return
    ways = {_identity(value): again for value, again in maps}
    choice = current_backend()

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        way = ways.get(_identity(kept), kept)
        if isinstance(way, Remembered):
            way.kept_once_more()
        return way

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        # The backward pass has threads of its own, which know of no `use_backend`.
        with use_backend(*choice):
            return kept()

    with saved_tensors_hooks(pack, unpack):
        yield


def recomputable(function: Callable[[Tensor], Tensor], x: Tensor) -> Recomputable:
    """function(x), which is cheap, and the way to compute it again from x."""
    return function(x), Remembered(function, x)


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that show the same memory; also without data."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


def recomputes(x: Tensor) -> bool:
    """Whether maps like x are computed again rather than kept: not by the reference."""
    chosen: bool = _recomputes(x)
    return chosen


def spares(x: Tensor) -> bool:
    """Whether maps that readers of x compute are computed again although that takes a while.

    x is as it is before autocast. So it is in half precision by the backend `cuda`: GPUs that
    Triton does not serve (sm_60 to sm_62) save memory by that precision, and no time.
    """
    chosen: bool = _spares(x)
    return chosen


_form = Implementation(lambda x: True, lambda x: None)
_recomputes = Operation(
    "recomputes", lambda x: False, triton=_form, cuda=_form, tuned_as="separable_branches"
)
_spares = Operation(
    "spares",
    lambda x: False,
    triton=Implementation(lambda x: False, lambda x: dtype_refusal("x", x)),
    cuda=Implementation(lambda x: computed_dtype(x).itemsize == 2, lambda x: dtype_refusal("x", x)),
    tuned_as="separable_branches",
)
