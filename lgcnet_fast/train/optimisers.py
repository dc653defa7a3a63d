"""SGD and Adam whose steps may be captured in a CUDA graph.

They differ from torch's in where numbers live, not in what they compute: state is allocated at
once, zero, which is what the first step would make of it, and the learning rate of SGD lies on the
device. Checkpoints hold the rate as a number, as torch's do with one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lgcnet_fast.train.schedules import DeviceScalar

OF_THIS_PROCESS = ("lr", "fused", "capturable")
"""Options that follow from the device and the configuration, never from a checkpoint."""


class _Capturable(torch.optim.Optimizer):
    """State that exists before the first step, and travels between devices and eager runs."""

    def _allocate(self) -> None:
        """Adds whatever state a parameter lacks."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                for name, value in self._initial_state(group, parameter).items():
                    state.setdefault(name, value)

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = [
            {name: group[name] for name in OF_THIS_PROCESS if name in group}
            for group in self.param_groups
        ]
        groups = [stored | mine for stored, mine in zip(state["param_groups"], own, strict=True)]
        super().load_state_dict({**state, "param_groups": groups})
        # Loading copies the options; the rate must stay the tensor that the schedule sets.
        for group, mine in zip(self.param_groups, own, strict=True):
            group.update(mine)
        self._allocate()


class SGD(_Capturable, torch.optim.SGD):
    """Fused SGD with momentum, whose learning rate the schedule sets through `lr`."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: DeviceScalar,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            parameters, lr=lr.value, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        for group in self.param_groups:
            group["lr"] = lr.tensor
        self._allocate()

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}


class Adam(_Capturable, torch.optim.Adam):
    """Fused Adam of a constant learning rate, counting its steps on the device."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(
            parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=True
        )
        self._allocate()

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
