"""Many weights cast in one launch, and their gradients in another.

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
from lgcnet_fast.ops.lanes import lanes_of, settle, side_by_side


def cast_together(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in a half-precision dtype, differentiable; the reference leaves them to autocast.

    weights: float32 and dense. Their gradients are float32, cast from those of the copies.
    """
    result: list[Tensor] = _operation(tuple(weights), dtype)
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
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        copy_together(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        settle(ctx.saved_tensors[0].device)
        found = [
            None if g is None else _place(weight)
            for g, weight in zip(gradients, ctx.saved_tensors, strict=True)
        ]
        copy_together(
            [out for out in found if out is not None], [g for g in gradients if g is not None]
        )
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


def _reference(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return list(weights)


def _run(backend: str, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return list(_CastTogether.apply(dtype, *weights))


def _refuse(backend: str, weights: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    for index, weight in enumerate(weights):
        if weight.dtype != torch.float32:
            return f"weights[{index}] is {weight.dtype}, need torch.float32"
    return None


_operation = Operation(
    "cast_together",
    _reference,
    **{
        backend: Implementation(partial(_run, backend), partial(_refuse, backend))
        for backend in ("triton", "cuda")
    },
    tuned_as="separable_branches",
)
