"""Sums of batch norms with an affine part by kernels: `lgcnet_fast::affine_norm_sum`.

    out = sum_k (gamma_k yhat_k + beta_k) + sum_j x_j

Launches as those of `mixed_norm_sum`; the gradients of gamma_k and beta_k are sums that the
gradients of the maps need anyway, and the gradient of every x_j is that of out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.library import custom_op

from lgcnet_fast.ops.fused_mixed_norm_sum import (
    launchers,
    norm_refusal,
    norm_statistics,
    tile,
)
from lgcnet_fast.ops.maps import dtype_refusal, empty_nhwc, nhwc, unstacked
from lgcnet_fast.ops.products import with_own


def fits(backend: str, ys: Sequence[Tensor], norms: Sequence[nn.Module | None]) -> bool:
    """Whether the kernels serve these maps and norms; if not, PyTorch's batch norms do.

    Those are one launch each where they normalise by running statistics, they share statistics
    between ranks, and the CUDA backend has no affine kernels.
    """
    kept = [norm for norm in norms if norm is not None]
    if backend != "triton" or not kept or not all(norm.training for norm in kept):
        return False
    if any(y.dtype != ys[0].dtype or dtype_refusal("ys", y) for y in ys):
        return False
    if any(y.ndim == 5 and None in own for y, own in with_own(ys, norms)):
        return False
    return norm_refusal(kept, ys[0], affine=True) is None


def run(ys: Sequence[Tensor], norms: Sequence[Any]) -> Tensor:
    """`mixed_norm_sum` without z, see there."""
    normed = [nhwc(y) for y, own in with_own(ys, norms) if own[0] is not None]
    plain = [nhwc(y) for y, own in with_own(ys, norms) if own[0] is None]
    kept = [norm for norm in norms if norm is not None]
    statistics, _ = norm_statistics("triton", normed, kept, len(plain))
    weights = [norm.weight for norm in kept], [norm.bias for norm in kept]
    result: Tensor = affine_sum(normed, plain, *weights, statistics)
    return result


@custom_op("lgcnet_fast::affine_norm_sum", mutates_args=())
def affine_sum(
    ys: list[Tensor],
    xs: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    statistics: Tensor,
) -> Tensor:
    """Of K maps ys with statistics (3, K, C) of the batch, and J plain ones xs."""
    forward, _ = launchers("triton")
    maps, packed = unstacked(ys), forward.Statistics(*statistics.unbind())
    config = tile("triton", "forward", maps, len(xs))
    out: Tensor = forward.affine_sum(maps, gammas, betas, packed, xs, **config)
    return out


@affine_sum.register_fake
def _(
    ys: list[Tensor],
    xs: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    statistics: Tensor,
) -> Tensor:
    return empty_nhwc(ys[0], ys[0].shape[-4:])


@custom_op("lgcnet_fast::affine_norm_sum_backward", mutates_args=())
def affine_sum_backward(
    g: Tensor, ys: list[Tensor], gammas: list[Tensor], statistics: Tensor
) -> list[Tensor]:
    """Gradients of every entry of ys; then (1 + K, C): that of each beta, those of all gammas."""
    forward, backward = launchers("triton")
    maps, packed = unstacked(ys), forward.Statistics(*statistics.unbind())
    config = tile("triton", "gradient_sums", maps, 0)
    rows = backward.gradient_sum_rows(g, maps, packed, **config)
    sums = backward.GradientSums.of(rows, len(maps))
    dys = [empty_nhwc(g, y.shape) for y in ys]
    config = tile("triton", "gradients", maps, 0)
    backward.affine_sum_grad(g, maps, gammas, packed, sums, dys=unstacked(dys), **config)
    return [*dys, rows]


@affine_sum_backward.register_fake
def _(g: Tensor, ys: list[Tensor], gammas: list[Tensor], statistics: Tensor) -> list[Tensor]:
    _, maps, channels = statistics.shape
    rows = statistics.new_empty(1 + maps, channels)
    return [*(empty_nhwc(g, y.shape) for y in ys), rows]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ys, xs, gammas, betas, statistics = inputs
    ctx.counts = len(ys), len(xs)
    ctx.save_for_backward(*ys, *gammas, statistics)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    entries, plain = ctx.counts
    *tensors, statistics = ctx.saved_tensors
    ys, gammas = tensors[:entries], tensors[entries:]
    *dys, rows = affine_sum_backward(nhwc(g), ys, gammas, statistics)
    # The betas get one tensor, not views of it: autograd must see that it is theirs together.
    d_beta, *d_gammas = rows.unbind()
    return dys, [g] * plain, d_gammas, [d_beta] * len(gammas), None


affine_sum.register_autograd(_backward, setup_context=_keep)
