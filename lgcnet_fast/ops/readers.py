"""A map that several operations read: its gradients are summed in one launch.

The fused form hands every reader its own alias of the map (see fan_out.py), and computes its ReLU
again going backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TypeVar

from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.fan_out import aliases, rectified_aliases
from lgcnet_fast.ops.maps import refusal_by
from lgcnet_fast.ops.recompute import Recomputable, Remembered, recomputed
from lgcnet_fast.ops.rectified_convolutions import fuses
from lgcnet_fast.ops.strided_convolutions import fuses as fuses_strided

T = TypeVar("T")


class Readers:
    """Hands out x and relu(x), which is computed once: the plain form, which keeps relu(x)."""

    def __init__(self, x: Tensor, only_rectified: bool = False) -> None:
        self.x = x

    def plain(self) -> Tensor:
        """x, for one reader."""
        return self.x

    def rectified(self, function: Callable[[Tensor], T]) -> T:
        """function(relu(x))."""
        return rectified_together([self], lambda values: function(*values))

    def rectify(self) -> tuple[Tensor, list[Recomputable]]:
        """relu(x), for one reader, and how to compute it again if it need not be kept."""
        return self._relu, []

    def fuses(self, out_channels: int) -> bool:
        """Whether 3x3 convolutions to so many channels should be `rectified_convolutions` of x."""
        return False

    def strides(self, weight: Tensor) -> bool:
        """Whether the fused forms of 3x3 convolutions of stride 2 should take such weights."""
        return False

    @property
    def reads_itself(self) -> bool:
        """Whether what reads relu(x) best rectifies x itself, where it can."""
        return False

    @cached_property
    def _relu(self) -> Tensor:
        return F.relu(self.x)


class SummedReaders(Readers):
    """The fused form: keeps x, which others keep too, and rectifies it again when going backward.

    Where x is `only_rectified`, it keeps relu(x) instead, so that nothing is computed again.

    The readers of relu(x) together are one reader of x, so that few gradients are in memory at
    once.
    """

    def __init__(self, backend: str, x: Tensor, only_rectified: bool = False) -> None:
        super().__init__(x)
        self._backend = backend
        self._only_rectified = only_rectified
        self._plain: list[Tensor] = []
        self._rectified: list[Tensor] = []
        self._again = Remembered(F.relu, x)

    def plain(self) -> Tensor:
        if not self._plain:
            self._plain = aliases(self.x, self._backend)
        return self._plain.pop()

    def rectify(self) -> tuple[Tensor, list[Recomputable]]:
        if not self._rectified:
            x = self.x if self._only_rectified else self.plain()
            self._rectified += rectified_aliases(x, self._only_rectified, self._backend)
        value = self._rectified.pop()
        return value, [] if self._only_rectified else [(value, self._again)]

    def fuses(self, out_channels: int) -> bool:
        return not self._only_rectified and fuses(self._backend, self.x, out_channels)

    def strides(self, weight: Tensor) -> bool:
        return self._backend == "triton" and fuses_strided(self.x, weight)

    @property
    def reads_itself(self) -> bool:
        return self._backend == "triton" and not self._only_rectified


def rectified_together(several: Sequence[Readers], function: Callable[[Sequence[Tensor]], T]) -> T:
    """function of the relu(x) of each of these, which may come repeatedly."""
    values, ways = zip(*(one.rectify() for one in several), strict=True)
    if not any(ways):  # What compilers trace holds no hooks.
        return function(values)
    with recomputed(*(way for own in ways for way in own)):
        return function(values)


def readers(x: Tensor, only_rectified: bool = False) -> Readers:
    """The readers of a map x: (N, C, H, W). only_rectified: none of them takes it plain."""
    chosen: Readers = _readers(x, only_rectified)
    return chosen


def _refuse(backend: str, x: Tensor, only_rectified: bool) -> str | None:
    return refusal_by(backend, "x", x)


_readers = Operation(
    "readers",
    Readers,
    **{
        backend: Implementation(partial(SummedReaders, backend), partial(_refuse, backend))
        for backend in ("triton", "cuda")
    },
    tuned_as="separable_branches",
)
