"""The depthwise launchers of both backends under one signature, Triton's with tuned tiles.

Both serve all dilations of an input in one launch, but for gradients of large maps by `cuda`, which
take one a branch. On GPUs of sm_90 `triton` takes both gradients of several branches from one
launch of csrc/depthwise_branches.cuh where the extension was compiled: Triton cannot multiply maps
where they lie in shared memory, shifted, by the matrix units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lgcnet_fast.ops.lanes import side_by_side
from lgcnet_fast.ops.maps import empty_nhwc
from lgcnet_fast.ops.tuning import shape_key, tuned


def filtered_maps(
    backend: str,
    x: Tensor,
    windows: Tensor,
    dilations: Sequence[int],
    stride: int,
) -> Tensor:
    """Depthwise convolutions of relu(x): a stack (edges, B, N, C, H', W') of NHWC maps.

    x: (N, C, H, W), NHWC; windows: (edges, B, 3, 3, C); dilations: B of them.
    """
    if backend == "cuda":
        from lgcnet_fast.native.depthwise import branches_forward

        y = empty_nhwc(x, _shape(x, windows, stride))
        branches = *_branches(windows, dilations), y.flatten(0, 1)
        branches_forward(x, *branches, stride=stride, relu=True)
        return y
    from lgcnet_fast.kernels.depthwise import ForwardConfig, depthwise_multi

    default = ForwardConfig.default(_shape(x, windows, stride), dilations, stride)
    config = _tuned(default, "forward", x, windows, dilations, stride)
    return depthwise_multi(x, windows, dilations, stride, relu=True, config=config)


def depthwise_gradients(
    backend: str,
    dy: Tensor | Sequence[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: Sequence[int],
    stride: int,
    of_products: Callable[[], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `filtered_maps` to x and to the windows, and what `of_products` sums.

    dy: like the maps, or each of them apart, edge after edge, which Triton's kernels take too.
    That of the windows is as parameters lie in memory, (edges * B, C, 3, 3), in the accumulator's
    dtype. of_products: the end of the pointwise gradients, see `pointwise_gradients`; where both
    are sums of shares they take one launch.
    """
    launch = (x, windows, dilations, stride)
    if backend == "cuda":
        assert isinstance(dy, Tensor)
        (dx, dw), (d_products,) = side_by_side(
            x.device, [lambda: _cuda_gradients(dy, *launch)], [lambda: (of_products(),)]
        )
        return dx, dw.flatten(0, 1).movedim(-1, 1).contiguous(), d_products
    from lgcnet_fast.kernels.common import unsummed

    if gradients_take_one_launch(dy, x, dilations, stride):
        from lgcnet_fast.native.depthwise_branches import depthwise_branches_backward

        maps = _listed(dy)
        dx, shares = depthwise_branches_backward(maps, x, windows.float().contiguous(), dilations)
        return dx, *_summed_later(shares, shares, of_products)
    if windows.shape[:2] == (1, 1):
        one = dy.flatten(0, 1)[0] if isinstance(dy, Tensor) else dy[0]
        (dx, dw), shares = unsummed(lambda: _gradients_of_one(one, *launch))
        return dx, *_summed_later(dw, shares, of_products)
    (dx,), (dw, d_products) = side_by_side(
        x.device,
        [lambda: (depthwise_input_gradient(dy, *launch),)],
        [partial(_weight_gradients, dy, *launch, of_products)],
    )
    return dx, dw, d_products


def gradients_take_one_launch(
    dy: Tensor | Sequence[Tensor], x: Tensor, dilations: Sequence[int], stride: int
) -> bool:
    """Whether `depthwise_gradients` of `triton` has both by one."""
    from lgcnet_fast.native.depthwise_branches import refusal

    maps = _listed(dy)
    return len(maps) > 1 and refusal(maps, x, dilations, stride) is None


def _listed(maps: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Edge after edge."""
    return maps.flatten(0, 1).unbind() if isinstance(maps, Tensor) else maps


def depthwise_weight_gradients(
    dy: Tensor | Sequence[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: Sequence[int],
    stride: int,
    of_products: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """What `depthwise_gradients` gives beside that of x; by Triton's kernels, several branches."""
    job = partial(_weight_gradients, dy, x, windows, dilations, stride, of_products)
    (found,) = side_by_side(x.device, [], [job])
    return found


def depthwise_input_gradient(
    dy: Tensor | Sequence[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: Sequence[int],
    stride: int,
    others: Sequence[Tensor] = (),
) -> Tensor:
    """That of x, to which the others are added; by Triton's kernels, several branches."""
    from lgcnet_fast.kernels.depthwise_input_grad import (
        InputGradConfig,
        depthwise_multi_input_grad,
    )

    launch = (x, windows, dilations, stride)
    default = InputGradConfig.default(_shape(x, windows, stride), stride)
    config = _tuned(default, "input_grad", *launch)
    return depthwise_multi_input_grad(dy, *launch, relu=True, config=config, others=others)


def _weight_gradients(
    dy: Tensor | Sequence[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: Sequence[int],
    stride: int,
    of_products: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    from lgcnet_fast.kernels.common import unsummed

    launch = (x, windows, dilations, stride)
    return _summed(*unsummed(lambda: _weight_gradient(dy, *launch)), of_products)


def _weight_gradient(
    dy: Tensor | Sequence[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: Sequence[int],
    stride: int,
) -> Tensor:
    from lgcnet_fast.kernels.depthwise_weight_grad import (
        WeightGradConfig,
        depthwise_multi_weight_grad,
    )

    launch = (x, windows, dilations, stride)
    default = WeightGradConfig.default(_shape(x, windows, stride), dilations, stride)
    config = _tuned(default, "weight_grad", *launch)
    return depthwise_multi_weight_grad(dy, *launch, relu=True, config=config)


def _gradients_of_one(
    dy: Tensor, x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> tuple[Tensor, Tensor]:
    """Of a single branch, from one launch where the stride divides the dilation."""
    from lgcnet_fast.kernels.depthwise_backward import depthwise_backward
    from lgcnet_fast.kernels.depthwise_weight_grad import WeightGradConfig

    default = WeightGradConfig.default(_shape(x, windows, stride), dilations, stride)
    config = _tuned(default, "backward", x, windows, dilations, stride)
    branch = (dy, x, windows[0, 0], dilations[0], stride)
    return depthwise_backward(*branch, relu=True, config=config)


def normalised_gradients(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    windows: Tensor,
    norm: tuple[Tensor, Tensor],
    of_products: Callable[[], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `normalised_depthwise_backward` gives of the norms, see there, and the gradients of the
    weights as `depthwise_gradients` does; dys: a map for each of xs."""
    from lgcnet_fast.kernels.common import unsummed
    from lgcnet_fast.kernels.normalised_depthwise import normalised_depthwise_backward

    (d_yhat, dw, sums), shares = unsummed(
        lambda: normalised_depthwise_backward(dys, xs, windows, norm)
    )
    return d_yhat, sums, *_summed_later(dw, shares, of_products)


def _summed_later(
    dw: Tensor, shares: Tensor | None, of_products: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """As `_summed`, beside what goes on with the gradients of the maps."""
    job = partial(_summed, dw, shares, of_products)
    (found,) = side_by_side(dw.device, [], [job])
    return found


def _summed(
    dw: Tensor, shares: Tensor | None, of_products: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """dw: the result, where it has no shares."""
    from lgcnet_fast.kernels.common import sum_shares, unsummed

    d_products, of_their_own = unsummed(of_products)
    d_windows, summed = sum_shares(dw[None] if shares is None else shares, of_their_own)
    return d_windows, d_products if summed is None else summed


def _cuda_gradients(
    dy: Tensor, x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> tuple[Tensor, Tensor]:
    from lgcnet_fast.native.depthwise import branches_backward

    branches = *_branches(windows, dilations), dy.flatten(0, 1)
    dx, dw = branches_backward(x, *branches, stride=stride, relu=True)
    return dx, dw.view_as(windows)


def _branches(windows: Tensor, dilations: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Window and dilation of each branch; CUDA kernels read aligned float32 windows."""
    each = windows.float().flatten(0, 1).unbind()
    aligned = [window if window.data_ptr() % 16 == 0 else window.clone() for window in each]
    return aligned, list(dilations) * len(windows)


def _shape(x: Tensor, windows: Tensor, stride: int) -> tuple[int, ...]:
    """(edges, B, N, C, H', W')."""
    images, channels, height, width = x.shape
    edges, branches = windows.shape[:2]
    return edges, branches, images, channels, -(-height // stride), -(-width // stride)


def _tuned(
    default: Any, launch: str, x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> Any:
    """The tile that the tuning table of the device has for a launch."""
    key = shape_key(x.dtype, x.shape, dilations, (stride, windows.shape[0]))
    return tuned(default, f"depthwise_{launch}", key, x.device)
