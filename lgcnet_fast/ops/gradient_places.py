"""Places that an optimiser has for the gradients of its parameters.

It steps all parameters in one launch if their gradients lie in one stretch of memory. Operations
that make many of them ask for these places, so that they need not be copied there afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from weakref import WeakSet

from torch import Tensor

Home = tuple[int, int]
"""Where a parameter lies: its storage and where it begins there. Aliases have the same one."""


class GradientPlaces:
    """Each place is given out once between two calls of `offer`."""

    def __init__(
        self, parameters: Sequence[Tensor], make: Callable[[], tuple[Tensor, Sequence[Tensor]]]
    ) -> None:
        """make: gives the memory, and the places in it, like the parameters."""
        self._parameters = list(parameters)
        self._numbers = {_home(parameter): at for at, parameter in enumerate(parameters)}
        self._free: dict[Home, int] = {}
        self._make = make
        self._places: Sequence[Tensor] = ()
        self.memory: Tensor | None = None
        """Once a place has been given out."""
        _known.add(self)

    def offer(self) -> None:
        """Whoever has read what lies in the places does not read it again."""
        self._free = dict(self._numbers)

    def take(self, home: Home) -> Tensor | None:
        at = self._free.pop(home, None)
        # Autograd would add to a gradient that is there already.
        if at is None or self._parameters[at].grad is not None:
            return None
        if _home(self._parameters[at]) != home:
            return None
        if self.memory is None:
            self.memory, self._places = self._make()
        # Autograd takes over only what nobody else refers to.
        return self._places[at].detach()


_known: WeakSet[GradientPlaces] = WeakSet()


def homes(weights: Iterable[Tensor]) -> list[Home | None]:
    """For `taken`; None for weights that are computed from parameters."""
    return [_home(weight) if weight.is_leaf else None for weight in weights]


def taken(home: Home | None) -> Tensor | None:
    """The place for the gradient of a parameter, if there is one that nobody has taken yet."""
    if home is None:
        return None
    found = (places.take(home) for places in _known)
    return next((place for place in found if place is not None), None)


def _home(parameter: Tensor) -> Home:
    return parameter.untyped_storage()._cdata, parameter.storage_offset()
