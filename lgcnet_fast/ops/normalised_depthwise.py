"""Second stages of `sep3` by Triton's kernels, which normalise what they load.

The depthwise convolution reads the raw first stage: normalised, rectified maps are never written.
Its backward pass gives the gradient of the norm's output and, on the way, the sums from which the
norm's own gradient follows.

Traffic in maps, C_out = C: forward reads and writes one, one more of each where the products are
made here; backward reads 4 and writes 2, and with products reads 3 and writes 2 more, one less of
each where the depthwise map has been kept.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import custom_op

from lgcnet_fast.ops.depthwise_kernels import filtered_maps, normalised_gradients
from lgcnet_fast.ops.fused_mixed_norm_sum import norm_gradient
from lgcnet_fast.ops.maps import accumulator, empty_nhwc
from lgcnet_fast.ops.pointwise_kernels import pointwise_gradients


@custom_op("lgcnet_fast::normalised_depthwise", mutates_args=())
def normalised_depthwise(y: Tensor, windows: Tensor, statistics: Tensor) -> Tensor:
    """The depthwise convolution of relu(norm(y)): (1, 1, N, C, H, W).

    y: (N, C, H, W), NHWC; windows: (1, 3, 3, C); statistics: (3, 1, C), of `norm_statistics`.
    """
    return filtered_maps("triton", y, windows[None], (1,), 1, _norm(statistics))


@normalised_depthwise.register_fake
def _(y: Tensor, windows: Tensor, statistics: Tensor) -> Tensor:
    return empty_nhwc(y, (1, 1, *y.shape))


@custom_op("lgcnet_fast::normalised_depthwise_backward", mutates_args=())
def normalised_depthwise_backward(
    g: Tensor,
    x: Tensor,
    windows: Tensor,
    products: Tensor,
    statistics: Tensor,
    training: bool,
    filtered: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the window as (1, C, 3, 3), and of products.

    x: y of `normalised_depthwise`; products: (1, C_out, C) where g (1, N, C_out, H, W) is that of
    the products; empty where it is that of the depthwise map. training: whether the statistics are
    the batch's. filtered: the result of `normalised_depthwise` for products; empty: make it again.
    Gradients of weights are in the accumulator's dtype.
    """

    def of_products() -> Tensor:
        return products.new_empty(products.shape, dtype=accumulator(products.dtype))

    dy, norm = g[0], _norm(statistics)
    if products.numel():
        kept = bool(filtered.numel())
        own = filtered[0] if kept else filtered_maps("triton", x, windows[None], (1,), 1, norm)[0]
        out = empty_nhwc(own, own.shape) if kept else own
        of_products = pointwise_gradients("triton", [g], own, products, out)
        dy = out[0]
        del own, out
    d_normalised, sums, *of_weights = normalised_gradients(dy, x, windows[0], norm, of_products)
    del dy  # And with it the depthwise map, before there is one more.
    return norm_gradient(d_normalised, x, statistics, sums, training), *of_weights


@normalised_depthwise_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    windows: Tensor,
    products: Tensor,
    statistics: Tensor,
    training: bool,
    filtered: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    return (
        empty_nhwc(x, x.shape),
        x.new_empty(1, x.shape[1], 3, 3, dtype=dtype),
        x.new_empty(products.shape, dtype=dtype),
    )


def _norm(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation."""
    mean, _, inverse_deviation = statistics[:, 0].unbind()
    return mean, inverse_deviation
