"""Final upsampling fused with the loss or the argmax by Triton, registered with torch.

`lgcnet_fast::upsample_cross_entropy` and `::upsample_ohem` return the loss and the sums that make
its gradient (none unless `gradient`), `::upsample_loss_backward` the gradient of the logits,
`::upsample_argmax` labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.backend import Implementation
from lgcnet_fast.ops.maps import empty_nhwc, nhwc
from lgcnet_fast.ops.tuning import shape_key, tuned

if TYPE_CHECKING:
    from lgcnet_fast.kernels.upsample_cells import CellConfig

Losses = tuple[Tensor, Tensor, Tensor]
"""Loss, and the fields of kernels' `LossSums`; these are empty without a gradient."""

_MOST_CLASSES = 32
"""Whose logits fit into a thread's registers."""
_LARGEST = 32768


def loss_key(dtype: torch.dtype, logits: Sequence[int], size: Sequence[int]) -> str:
    """Of upsample_cross_entropy, upsample_ohem and upsample_argmax in tuning tables."""
    return shape_key(dtype, logits, size)


# -- losses ---------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::upsample_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor? weight, int ignore_index, bool gradient)"
    " -> (Tensor, Tensor, Tensor)",
)
def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, gradient: bool
) -> Losses:
    from lgcnet_fast.kernels.upsample_loss import upsample_cross_entropy_forward

    config = _loss_config("upsample_cross_entropy", logits, target)
    loss, sums = upsample_cross_entropy_forward(
        nhwc(logits), target.contiguous(), _dense(weight), ignore_index, gradient, config
    )
    return loss, *(sums or _nothing(loss))


@custom_op(
    "lgcnet_fast::upsample_ohem",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, float threshold, float keep, Tensor? weight,"
    " int ignore_index, bool gradient) -> (Tensor, Tensor, Tensor)",
)
def _ohem(
    logits: Tensor,
    target: Tensor,
    threshold: float,
    keep: float,
    weight: Tensor | None,
    ignore_index: int,
    gradient: bool,
) -> Losses:
    from lgcnet_fast.kernels.upsample_loss import upsample_ohem_forward

    config = _loss_config("upsample_ohem", logits, target)
    loss, sums = upsample_ohem_forward(
        nhwc(logits),
        target.contiguous(),
        threshold,
        keep,
        _dense(weight),
        ignore_index,
        gradient,
        config,
    )
    return loss, *(sums or _nothing(loss))


@_cross_entropy.register_fake
def _(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, gradient: bool
) -> Losses:
    return _shapes("upsample_cross_entropy", logits, target, gradient)


@_ohem.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    threshold: float,
    keep: float,
    weight: Tensor | None,
    ignore_index: int,
    gradient: bool,
) -> Losses:
    return _shapes("upsample_ohem", logits, target, gradient)


def _shapes(operation: str, logits: Tensor, target: Tensor, gradient: bool) -> Losses:
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty((), dtype=precise)
    if not gradient:
        return loss, *_nothing(loss)
    batch, classes, h, w = logits.shape
    rows = _loss_config(operation, logits, target).rows
    return loss, loss.new_empty((batch, -(-h // rows), rows + 1, 2, classes, w)), loss.new_empty(())


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _nothing(loss: Tensor) -> tuple[Tensor, Tensor]:
    return loss.new_empty(0), loss.new_empty(0)


# -- gradient -------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::upsample_loss_backward",
    mutates_args=(),
    schema="(Tensor corners, Tensor mass, Tensor grad, int[] shape, ScalarType dtype) -> Tensor",
)
def _loss_backward(
    corners: Tensor, mass: Tensor, grad: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    from lgcnet_fast.kernels.upsample_loss import LossSums, upsample_loss_backward

    out = _empty_logits(corners, shape, dtype)
    return upsample_loss_backward(LossSums(corners, mass), grad, like=out, out=out)


@_loss_backward.register_fake
def _(
    corners: Tensor, mass: Tensor, grad: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return _empty_logits(corners, shape, dtype)


def _empty_logits(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return empty_nhwc(like.new_empty(0, dtype=dtype), shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Losses) -> None:
    logits, (_, corners, mass) = inputs[0], output
    ctx.inputs, ctx.shape, ctx.dtype = len(inputs), logits.shape, logits.dtype
    ctx.save_for_backward(corners, mass)
    # The sums have no gradient, and zeros of their size would cost a kernel.
    ctx.set_materialize_grads(False)


def _logits_gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (ctx.inputs - 1)
    if grad is None:
        return None, *rest
    return _loss_backward(*ctx.saved_tensors, grad, ctx.shape, ctx.dtype), *rest


_cross_entropy.register_autograd(_logits_gradient, setup_context=_remember)
_ohem.register_autograd(_logits_gradient, setup_context=_remember)


# -- labels ---------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::upsample_argmax", mutates_args=(), schema="(Tensor logits, int[] size) -> Tensor"
)
def _argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    from lgcnet_fast.kernels.upsample_argmax import ARGMAX, upsample_argmax_forward

    key = loss_key(logits.dtype, logits.shape, size)
    config = tuned(ARGMAX, "upsample_argmax", key, logits.device)
    height, width = size
    return upsample_argmax_forward(nhwc(logits), (height, width), config=config)


@_argmax.register_fake
def _(logits: Tensor, size: Sequence[int]) -> Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)


# -- implementations ------------------------------------------------------------------------------


def _run_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    gradient = torch.is_grad_enabled() and logits.requires_grad
    return _cross_entropy(logits, target, weight, ignore_index, gradient)[0]


def _run_ohem(
    logits: Tensor,
    target: Tensor,
    threshold: float,
    keep: float,
    weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    gradient = torch.is_grad_enabled() and logits.requires_grad
    return _ohem(logits, target, threshold, keep, weight, ignore_index, gradient)[0]


def _run_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    return _argmax(logits.detach(), size)


def _refuse_loss(logits: Tensor, target: Tensor, *rest: Any) -> str | None:
    return _refuse_argmax(logits, target.shape[1:])


def _refuse_argmax(logits: Tensor, size: Sequence[int]) -> str | None:
    classes = logits.shape[1]
    if classes > _MOST_CLASSES:
        return f"{classes} classes, at most {_MOST_CLASSES} fit into registers"
    longest = max(*logits.shape[2:], *size)
    return f"a side of {longest} pixels, at most {_LARGEST} fit" if longest > _LARGEST else None


CROSS_ENTROPY = Implementation(_run_cross_entropy, _refuse_loss)
OHEM = Implementation(_run_ohem, _refuse_loss)
ARGMAX = Implementation(_run_argmax, _refuse_argmax)


def _loss_config(operation: str, logits: Tensor, target: Tensor) -> CellConfig:
    from lgcnet_fast.kernels.upsample_loss import LOSS

    key = loss_key(logits.dtype, logits.shape, target.shape[1:])
    return tuned(LOSS, operation, key, logits.device)
