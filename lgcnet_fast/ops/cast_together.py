"""Many weights cast in a few launches, and their gradients in others.

Autocast casts weight by weight, and so does its backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.ops.backend import Implementation, Operation, supposing
from lgcnet_fast.ops.gradient_places import homes, taken
from lgcnet_fast.ops.lanes import beside_next, lanes_of, settle, side_by_side


def cast_together(
    weights: Sequence[Tensor], dtype: torch.dtype, copies: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Copies in a half-precision dtype, differentiable; the reference leaves them to autocast.

    weights: float32 and dense. Their gradients are float32, cast from those of the copies. copies:
    what `copies_together` gave, if that was called.
    """
    result: list[Tensor] = _operation(tuple(weights), dtype, tuple(copies))
    return result


def copies_together(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For `cast_together`: the copies without autograd, made beside something else for example.

    None in the reference.
    """
    result: list[Tensor] = _copies(tuple(weights), dtype)
    return result


def copy_together(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies many tensors in launches beside each other, each of which leaves most of a GPU idle.

    Tensors of a pair have the same strides; otherwise every pair would be a launch.
    """
    device = targets[0].device
    lanes = min(lanes_of(device), len(targets))
    jobs = [
        partial(torch._foreach_copy_, targets[lane::lanes], sources[lane::lanes])
        for lane in range(lanes)
    ]
    side_by_side(device, jobs)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        ctx.only_collected = gradient_owners(weights) is not None
        ctx.set_materialize_grads(False)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        device = weights[0].device
        found = [
            None if g is None else _place(weight)
            for g, weight in zip(gradients, weights, strict=True)
        ]
        # Aliases: autograd takes over what nobody else refers to, and copies anything else.
        outs = [out.detach() for out in found if out is not None]
        job = partial(copy_together, outs, [g for g in gradients if g is not None])
        if ctx.only_collected:
            beside_next(device, job)
        else:
            settle(device)
            job()
        return None, *found


def _place(weight: Tensor) -> Tensor:
    """For its gradient: like the weight in memory, as the optimiser wants it."""
    (home,) = homes([weight])
    place = taken(home)
    if place is None or (place.shape, place.stride()) != (weight.shape, weight.stride()):
        return torch.empty_like(weight)
    return place


def gradient_owners(weights: Sequence[Tensor]) -> tuple[int, ...] | None:
    """What `settle` takes before their gradients are returned: their addresses.

    None where autograd goes on to compute with them: unless these are leaves, or copies that
    `cast_together` made, which waits itself.
    """
    own = (type(None), _CastTogether._backward_cls)  # type: ignore[attr-defined]
    if supposing() or not all(isinstance(weight.grad_fn, own) for weight in weights):
        return None
    return tuple(weight.data_ptr() for weight in weights)


def _reference(
    weights: Sequence[Tensor], dtype: torch.dtype, copies: Sequence[Tensor]
) -> list[Tensor]:
    return list(weights)


def _run(weights: Sequence[Tensor], dtype: torch.dtype, copies: Sequence[Tensor]) -> list[Tensor]:
    return list(_CastTogether.apply(copies or _make_copies(weights, dtype), *weights))


@torch.no_grad()
def _make_copies(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    copy_together(copies, weights)
    return copies


def _refuse(weights: Sequence[Tensor], dtype: torch.dtype, *copies: Any) -> str | None:
    for index, weight in enumerate(weights):
        if weight.dtype != torch.float32:
            return f"weights[{index}] is {weight.dtype}, need torch.float32"
    return None


_operation = Operation(
    "cast_together",
    _reference,
    triton=Implementation(_run, _refuse),
    cuda=Implementation(_run, _refuse),
    tuned_as="separable_branches",
)
_copies = Operation(
    "copies_together",
    lambda weights, dtype: [],
    triton=Implementation(_make_copies, _refuse),
    cuda=Implementation(_make_copies, _refuse),
    tuned_as="separable_branches",
)
