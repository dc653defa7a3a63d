"""Final upsampling fused with the loss or the argmax by kernels, registered with torch.

`lgcnet_fast::upsample_cross_entropy` and `::upsample_ohem` return the loss and the sums that make
its gradient (none unless `gradient`), `::upsample_loss_backward` the gradient of the logits,
`::upsample_argmax` labels. All take the backend whose kernels run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
"""Whose logits a thread can hold."""
_LARGEST = 32768


def loss_key(dtype: torch.dtype, logits: Sequence[int], size: Sequence[int]) -> str:
    """Of upsample_cross_entropy, upsample_ohem and upsample_argmax in tuning tables."""
    return shape_key(dtype, logits, size)


# -- losses ---------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::upsample_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor? weight, int ignore_index, bool gradient,"
    " str backend) -> (Tensor, Tensor, Tensor)",
)
def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    gradient: bool,
    backend: str,
) -> Losses:
    arguments = (nhwc(logits), target.contiguous(), _dense(weight), ignore_index, gradient)
    if backend == "cuda":
        from lgcnet_fast.native import upsample_loss as native

        return _losses(*native.upsample_cross_entropy_forward(*arguments))
    from lgcnet_fast.kernels.upsample_loss import upsample_cross_entropy_forward

    config = _loss_config("upsample_cross_entropy", logits, target)
    return _losses(*upsample_cross_entropy_forward(*arguments, config))


@custom_op(
    "lgcnet_fast::upsample_ohem",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, float threshold, float keep, Tensor? weight,"
    " int ignore_index, bool gradient, str backend) -> (Tensor, Tensor, Tensor)",
)
def _ohem(
    logits: Tensor,
    target: Tensor,
    threshold: float,
    keep: float,
    weight: Tensor | None,
    ignore_index: int,
    gradient: bool,
    backend: str,
) -> Losses:
    target, weight = target.contiguous(), _dense(weight)
    arguments = (nhwc(logits), target, threshold, keep, weight, ignore_index, gradient)
    if backend == "cuda":
        from lgcnet_fast.native import upsample_loss as native

        return _losses(*native.upsample_ohem_forward(*arguments))
    from lgcnet_fast.kernels.upsample_loss import upsample_ohem_forward

    config = _loss_config("upsample_ohem", logits, target)
    return _losses(*upsample_ohem_forward(*arguments, config))


@_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, *rest: Any) -> Losses:
    return _shapes("upsample_cross_entropy", logits, target, *rest[-2:])


@_ohem.register_fake
def _(logits: Tensor, target: Tensor, *rest: Any) -> Losses:
    return _shapes("upsample_ohem", logits, target, *rest[-2:])


def _shapes(operation: str, logits: Tensor, target: Tensor, gradient: bool, backend: str) -> Losses:
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty((), dtype=precise)
    if not gradient:
        return _losses(loss, None)
    batch, classes, h, w = logits.shape
    if backend == "cuda":
        from lgcnet_fast.native.upsample_loss import ROWS

        shape = (batch, -(-h // ROWS), ROWS + 1, 2, w, classes)
        return loss, loss.new_empty(shape).transpose(4, 5), loss.new_empty(())
    rows = _loss_config(operation, logits, target).rows
    return loss, loss.new_empty((batch, -(-h // rows), rows + 1, 2, classes, w)), loss.new_empty(())


def _losses(loss: Tensor, sums: tuple[Tensor, Tensor] | None) -> Losses:
    corners, mass = sums or (loss.new_empty(0), loss.new_empty(0))
    return loss, corners, mass


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


# -- gradient -------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::upsample_loss_backward",
    mutates_args=(),
    schema="(Tensor corners, Tensor mass, Tensor grad, int[] shape, ScalarType dtype, str backend)"
    " -> Tensor",
)
def _loss_backward(
    corners: Tensor,
    mass: Tensor,
    grad: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    out = _empty_logits(corners, shape, dtype)
    if backend == "cuda":
        from lgcnet_fast.native import upsample_loss as native

        sums = native.LossSums(corners, mass)
        return native.upsample_loss_backward(sums, grad, like=out, out=out)
    from lgcnet_fast.kernels.upsample_loss import LossSums, upsample_loss_backward

    return upsample_loss_backward(LossSums(corners, mass), grad, like=out, out=out)


@_loss_backward.register_fake
def _(
    corners: Tensor,
    mass: Tensor,
    grad: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _empty_logits(corners, shape, dtype)


def _empty_logits(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return empty_nhwc(like.new_empty(0, dtype=dtype), shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Losses) -> None:
    logits, (_, corners, mass) = inputs[0], output
    ctx.inputs, ctx.backend = len(inputs), inputs[-1]
    ctx.shape, ctx.dtype = logits.shape, logits.dtype
    ctx.save_for_backward(corners, mass)
    # The sums have no gradient, and zeros of their size would cost a kernel.
    ctx.set_materialize_grads(False)


def _logits_gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (ctx.inputs - 1)
    if grad is None:
        return None, *rest
    return _loss_backward(*ctx.saved_tensors, grad, ctx.shape, ctx.dtype, ctx.backend), *rest


_cross_entropy.register_autograd(_logits_gradient, setup_context=_remember)
_ohem.register_autograd(_logits_gradient, setup_context=_remember)


# -- labels ---------------------------------------------------------------------------------------


@custom_op(
    "lgcnet_fast::upsample_argmax",
    mutates_args=(),
    schema="(Tensor logits, int[] size, str backend) -> Tensor",
)
def _argmax(logits: Tensor, size: Sequence[int], backend: str) -> Tensor:
    height, width = size
    if backend == "cuda":
        from lgcnet_fast.native import upsample_argmax as native

        return native.upsample_argmax_forward(nhwc(logits), (height, width))
    from lgcnet_fast.kernels.upsample_argmax import ARGMAX, upsample_argmax_forward

    key = loss_key(logits.dtype, logits.shape, size)
    config = tuned(ARGMAX, "upsample_argmax", key, logits.device)
    return upsample_argmax_forward(nhwc(logits), (height, width), config=config)


@_argmax.register_fake
def _(logits: Tensor, size: Sequence[int], backend: str) -> Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)


# -- implementations ------------------------------------------------------------------------------


def _run_cross_entropy(backend: str, logits: Tensor, *rest: Any) -> Tensor:
    return _cross_entropy(logits, *rest, _needs_gradient(logits), backend)[0]


def _run_ohem(backend: str, logits: Tensor, *rest: Any) -> Tensor:
    return _ohem(logits, *rest, _needs_gradient(logits), backend)[0]


def _run_argmax(backend: str, logits: Tensor, size: Sequence[int]) -> Tensor:
    return _argmax(logits.detach(), size, backend)


def _needs_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


def _refuse(backend: str, logits: Tensor, target: Tensor | Sequence[int], *rest: Any) -> str | None:
    """target: labels, or the size of labels to be made."""
    size = target.shape[1:] if isinstance(target, Tensor) else target
    classes, longest = logits.shape[1], max(*logits.shape[2:], *size)
    if classes > _MOST_CLASSES:
        return f"{classes} classes, at most {_MOST_CLASSES} fit on chip"
    if longest > _LARGEST:
        return f"a side of {longest} pixels, at most {_LARGEST} fit"
    if backend == "cuda" and logits.dtype == torch.float64:
        return "its kernels have no float64"
    return None


def _forms(run: Callable[..., Tensor]) -> dict[str, Implementation]:
    return {
        backend: Implementation(partial(run, backend), partial(_refuse, backend))
        for backend in ("triton", "cuda")
    }


CROSS_ENTROPY = _forms(_run_cross_entropy)
OHEM = _forms(_run_ohem)
ARGMAX = _forms(_run_argmax)


def _loss_config(operation: str, logits: Tensor, target: Tensor) -> CellConfig:
    from lgcnet_fast.kernels.upsample_loss import LOSS

    key = loss_key(logits.dtype, logits.shape, target.shape[1:])
    return tuned(LOSS, operation, key, logits.device)
