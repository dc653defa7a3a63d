"""Autocast for all convolutions of a network at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lgcnet_fast.nn.primitives import DepthwiseSeparable
from lgcnet_fast.nn.together import replaced
from lgcnet_fast.ops import cast_together


@contextmanager
def cast_weights(network: nn.Module) -> Iterator[None]:
    """Inside the `with` block, under autocast, convolutions find their weights cast already.

    What autograd records leads to the float32 parameters, which are back in place afterwards.
    """
    places = list(_convolution_parameters(network))
    # Tensors without data ("meta") know no autocast.
    device = places[0][0][places[0][1]].device.type if places else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        yield
        return
    weights = [parameters[name] for parameters, name in places]
    copies = cast_together(weights, torch.get_autocast_dtype(device))
    with replaced(places, copies):
        yield


def _convolution_parameters(network: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module keeps a parameter, and its name.

    Not those of depthwise-separable branches, whose operation takes float32.
    """
    branches = (module for module in network.modules() if isinstance(module, DepthwiseSeparable))
    apart = {id(module) for branch in branches for module in branch.modules()}
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and id(module) not in apart:
            own: dict[str, Any] = module._parameters
            for name, parameter in own.items():
                if parameter is not None and parameter.dtype == torch.float32:
                    yield own, name
