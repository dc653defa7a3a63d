"""How a stage computes: device, memory format, autocast, and a loss scaler for fp16."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from lgcnet_fast.ops.constants import made_once
from lgcnet_fast.ops.lanes import gradients_later, side_by_side
from lgcnet_fast.train.optimisers import SGD, Adam

Network = TypeVar("Network", bound=nn.Module)

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; `auto` is bf16 on GPUs that compute in it, else fp32."""
    if precision != "auto":
        return precision
    # Compute capability 8.0 is the first with bf16 units; older GPUs only emulate it.
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if capable else "fp32"


def placed(network: Network, device: torch.device) -> Network:
    """`network` on the device, channels last, as the loaders deliver images."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class Precision:
    """How a training step computes: `autocast()` around the forward pass, `scaler` after it."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.dtype = _AUTOCAST.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        dtype = self.dtype or torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.dtype is not None)

    def backward(self, *losses: Tensor, first: bool, share: float = 1.0) -> None:
        """Adds `share` of the gradient of the sum of scalar losses, of one dtype.

        first: of the micro-batches of a step, so that no parameter has a gradient yet.
        """
        # Not computed from the losses: nothing lies between the last of them and the gradients.
        device = losses[0].device
        gradient = made_once(_scalar, share, losses[0].dtype, device)
        with gradients_later(device) if first else nullcontext():
            torch.autograd.backward(losses, [self.scaler.scale(gradient)] * len(losses))

    def step(self, *optimisers: tuple[SGD | Adam, float | None]) -> None:
        """After `backward`: unscales, clips the norm of each optimiser's gradients, steps.

        Optimisers of different parameters have nothing to do with each other.
        """
        side_by_side(self.device, [partial(self._step, *one) for one in optimisers])
        self.scaler.update()

    def _step(self, optimiser: SGD | Adam, clip: float | None) -> None:
        self.scaler.unscale_(optimiser)
        if clip is not None:
            optimiser.clip(clip)
        self.scaler.step(optimiser)


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
