"""SGD and Adam whose steps may be captured in a CUDA graph.

They differ from torch's in where numbers live, not in what they compute: state is allocated at
once, zero, which is what the first step would make of it, and the learning rate of SGD lies on the
device. Both clip while they step. SGD has its parameters in one stretch of memory, Adam takes its
few small ones in pieces. Checkpoints hold parameters one by one, and the rate as a number, as
torch's do with one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lgcnet_fast.ops.gradient_places import GradientPlaces
from lgcnet_fast.train.schedules import DeviceScalar
from lgcnet_fast.train.stretch import Stretch

PIECE = 2048
"""Numbers of a parameter that Adam takes at once: a multi-tensor launch has one program for up to
65,536 of each tensor, which is few for a graph-guided module."""

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

    def clip(self, norm: float) -> None:
        """Before a step: scales all gradients so that their norm together is at most `norm`."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)

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
    """Fused SGD with momentum, whose learning rate the schedule sets through `lr`.

    Parameters and their momenta move into a stretch of memory each, of which state dicts know
    nothing. Where every parameter has a gradient, a step gathers the gradients likewise and is then
    one launch instead of one for some 50 parameters. From `zero_grad` on operations may write
    gradients where the step gathers them (see ops/gradient_places.py).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: DeviceScalar,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """parameters: of one dtype and device."""
        super().__init__(
            parameters, lr=lr.value, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        for group in self.param_groups:
            group["lr"] = lr.tensor
        self._allocate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After loading, and in copies, parameters or momenta lie elsewhere."""
        super().__setstate__(state)
        self._stretch: Stretch | None = None
        self._places: GradientPlaces | None = None
        self._gradient: Tensor | None = None
        self._divisor: Tensor | None = None

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Here the step divides, so that gradients are not written twice."""
        gradient = self._gathered()
        if gradient is None:
            super().clip(norm)
        else:
            self._divisor = _divisor(torch.linalg.vector_norm(gradient), norm)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A loss scaler must have unscaled the gradients."""
        gradient = self._gathered() if closure is None else None
        if gradient is None:
            return super().step(closure)
        (group,) = self.param_groups
        torch._fused_sgd_(
            [self._weights],
            [gradient],
            [self._momenta] if group["momentum"] else [],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            grad_scale=self._divisor,
            found_inf=getattr(self, "found_inf", None),
        )
        self._gradient = self._divisor = None
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        # Of a step that a loss scaler has left out.
        self._gradient = self._divisor = None
        if set_to_none and self._places is not None:
            self._places.offer()

    def _gathered(self) -> Tensor | None:
        """The gradients of the step in a stretch; None where a parameter has none."""
        if self._gradient is None:
            (group,) = self.param_groups
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if len(gradients) < len(group["params"]):
                return None
            if self._stretch is None or not self._stretch.holds(self._weights, group["params"]):
                self._lay_out()
            assert self._stretch is not None and self._places is not None
            if self._places.memory is None:
                self._gradient = self._stretch.filled(gradients)
            else:
                self._stretch.fill(self._places.memory, gradients)
                self._gradient = self._places.memory
        return self._gradient

    def _allocate(self) -> None:
        super()._allocate()
        self._lay_out()

    @torch.no_grad()
    def _lay_out(self) -> None:
        """Moves parameters and momenta, with their values."""
        self._gradient = self._divisor = None
        (group,) = self.param_groups
        parameters = group["params"]
        self._stretch = Stretch(parameters)
        self._weights = self._stretch.filled(parameters)
        for parameter, view in zip(parameters, self._stretch.views(self._weights), strict=True):
            parameter.data = view
        make = partial(_gradients, self._stretch, self._weights)
        self._places = GradientPlaces(parameters, make)
        if group["momentum"]:
            states = [self.state[parameter] for parameter in parameters]
            self._momenta = self._stretch.filled([state["momentum_buffer"] for state in states])
            for state, view in zip(states, self._stretch.views(self._momenta), strict=True):
                state["momentum_buffer"] = view

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}


def _gradients(stretch: Stretch, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Memory for the gradients of weights in a stretch, and the place of each."""
    memory = stretch.zeros(weights)
    return memory, stretch.views(memory)


class Adam(_Capturable, torch.optim.Adam):
    """Fused Adam of a constant learning rate, counting its steps on the device."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """parameters: contiguous."""
        super().__init__(
            parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=True
        )
        self._allocate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._divisor: Tensor | None = None

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Here the step divides, so that gradients are not written twice."""
        parameters = self._stepped()
        if not parameters:
            return
        norms = torch._foreach_norm(_pieces(parameter.grad for parameter in parameters))
        self._divisor = _divisor(torch.linalg.vector_norm(torch.stack(norms)), norm)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A loss scaler must have unscaled the gradients."""
        parameters = self._stepped()
        if closure is not None or not parameters:
            return super().step(closure)
        (group,) = self.param_groups
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        found_inf = getattr(self, "found_inf", None)
        torch._fused_adam_(
            _pieces(parameters),
            _pieces(parameter.grad for parameter in parameters),
            _pieces(state["exp_avg"] for state in states),
            _pieces(state["exp_avg_sq"] for state in states),
            [],
            [step for p, step in zip(parameters, steps, strict=True) for _ in _pieces([p])],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self._divisor,
            found_inf=found_inf,
        )
        if found_inf is not None:  # The step was left out where it is not zero.
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        self._divisor = None
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._divisor = None  # Of a step that a loss scaler has left out.

    def _stepped(self) -> list[nn.Parameter]:
        (group,) = self.param_groups
        return [parameter for parameter in group["params"] if parameter.grad is not None]

    def _initial_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _divisor(total: Tensor, norm: float) -> Tensor:
    """Of gradients whose norm is `total`: the inverse of clip_grad_norm_'s factor."""
    return ((total + 1e-6) / norm).clamp(min=1)


def _pieces(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [piece for tensor in tensors for piece in tensor.view(-1).split(PIECE)]
