"""Autocast for all convolutions of a network at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lgcnet_fast.nn.primitives import DepthwiseSeparable
from lgcnet_fast.nn.together import replaced
from lgcnet_fast.ops import cast_together, copies_together


class WeightCasts:
    """For a pass through a network, or through all of it but a part of its modules."""

    def __init__(self, network: nn.Module, without: nn.Module | None = None) -> None:
        self._places = list(_convolution_parameters(network, without))
        # Tensors without data ("meta") know no autocast.
        first = self._weights()[0] if self._places else None
        device = "meta" if first is None else first.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            self._places = []
        else:
            self._dtype = torch.get_autocast_dtype(device)
        self._copies: list[Tensor] = []

    def make(self) -> None:
        """Ahead of `in_place`, which does it otherwise; without autograd."""
        if self._places:
            self._copies = copies_together(self._weights(), self._dtype)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the `with` block, under autocast, convolutions find their weights cast already.

        What autograd records leads to the float32 parameters, which are back in place afterwards.
        """
        if not self._places:
            yield
            return
        copies = cast_together(self._weights(), self._dtype, self._copies)
        with replaced(self._places, copies):
            yield

    def _weights(self) -> list[Tensor]:
        return [parameters[name] for parameters, name in self._places]


def cast_weights(network: nn.Module) -> AbstractContextManager[None]:
    """`WeightCasts.in_place` for a whole network."""
    return WeightCasts(network).in_place()


def _convolution_parameters(
    network: nn.Module, without: nn.Module | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module keeps a parameter, and its name.

    Not those of depthwise-separable branches, whose operation takes float32.
    """
    left_out = [module for module in network.modules() if isinstance(module, DepthwiseSeparable)]
    if without is not None:
        left_out.append(without)
    apart = {id(module) for one in left_out for module in one.modules()}
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and id(module) not in apart:
            own: dict[str, Any] = module._parameters
            for name, parameter in own.items():
                if parameter is not None and parameter.dtype == torch.float32:
                    yield own, name
