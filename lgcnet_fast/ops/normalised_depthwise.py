"""Second stages of `sep3` by Triton's kernels, which normalise what they load: edges in one launch.

The depthwise convolutions read the raw first stages: normalised, rectified maps are never written.
Their backward pass gives the gradients of the norms' outputs and, on the way, the sums from which
the norms' own gradients follow.

Traffic of an edge in maps, C_out = C: forward reads and writes one, one more of each where the
products are made here; backward reads 4 and writes 2, and with products reads 3 and writes 2 more,
one less of each where the depthwise map has been kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.depthwise_kernels import normalised_gradients
from lgcnet_fast.ops.maps import accumulator, empty_nhwc
from lgcnet_fast.ops.pointwise_kernels import pointwise_gradients


@custom_op("lgcnet_fast::normalised_depthwise", mutates_args=())
def normalised_depthwise(ys: list[Tensor], windows: Tensor, statistics: Tensor) -> Tensor:
    """The depthwise convolutions of relu(norm(y)) of all edges: (E, N, C, H, W).

    ys: a map (N, C, H, W), NHWC, for each of E edges; windows: (E, 3, 3, C); statistics: (3, E, C),
    of `norm_statistics`.
    """
    from lgcnet_fast.kernels import normalised_depthwise as kernel

    return kernel.normalised_depthwise(ys, windows, _norm(statistics))


@normalised_depthwise.register_fake
def _(ys: list[Tensor], windows: Tensor, statistics: Tensor) -> Tensor:
    return _stack_like(ys)


@custom_op("lgcnet_fast::normalised_depthwise_backward", mutates_args=())
def normalised_depthwise_backward(
    gradients: list[Tensor],
    ys: list[Tensor],
    windows: Tensor,
    products: Tensor,
    statistics: Tensor,
    training: bool,
    filtered: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ys, (E, N, C, H, W), of the windows as (E, C, 3, 3), and of products.

    ys: as in `normalised_depthwise`; products: (E, C_out, C) where gradients, a stack
    (1, N, C_out, H, W) for each edge, are those of the products; empty where they are those of the
    depthwise maps. training: whether the statistics are the batch's. filtered: the result of
    `normalised_depthwise` for products; empty: make it again. Gradients of weights are in the
    accumulator's dtype.
    """
    from lgcnet_fast.kernels import normalised_depthwise as kernel

    def of_products() -> Tensor:
        return products.new_empty(products.shape, dtype=accumulator(products.dtype))

    dys, norm = [g[0] for g in gradients], _norm(statistics)
    if products.numel():
        kept = bool(filtered.numel())
        own = filtered if kept else kernel.normalised_depthwise(ys, windows, norm)
        out = _stack_like(ys) if kept else own
        of_products = pointwise_gradients("triton", gradients, own, products, out)
        dys = list(out)
    dxs, sums, *of_weights = normalised_gradients(dys, ys, windows, norm, of_products)
    # Running statistics do not depend on the maps: no gradient passes through them.
    kernel.norm_gradients(dxs, ys, norm, sums if training else torch.zeros_like(sums))
    return dxs, *of_weights


@normalised_depthwise_backward.register_fake
def _(
    gradients: list[Tensor],
    ys: list[Tensor],
    windows: Tensor,
    products: Tensor,
    statistics: Tensor,
    training: bool,
    filtered: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(ys[0].dtype)
    return (
        _stack_like(ys),
        windows.new_empty(len(ys), ys[0].shape[1], 3, 3, dtype=dtype),
        products.new_empty(products.shape, dtype=dtype),
    )


def _stack_like(ys: list[Tensor]) -> Tensor:
    """An uninitialised one of a map for each edge."""
    return empty_nhwc(ys[0], (len(ys), *ys[0].shape))


def _norm(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation."""
    mean, _, inverse_deviation = statistics.unbind()
    return mean, inverse_deviation
