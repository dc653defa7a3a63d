"""The depthwise launchers of both backends under one signature, Triton's with tuned tiles.

Triton's kernels serve all dilations of an input in one launch; the CUDA ones serve one branch a
launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.ops.lanes import side_by_side
from lgcnet_fast.ops.maps import empty_nhwc
from lgcnet_fast.ops.tuning import shape_key, tuned


def filtered_maps(
    backend: str, x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> Tensor:
    """Depthwise convolutions of relu(x): a stack (edges, B, N, C, H', W') of NHWC maps.

    x: (N, C, H, W), NHWC; windows: (edges, B, 3, 3, C); dilations: B of them.
    """
    if backend == "cuda":
        from lgcnet_fast.native.depthwise import depthwise_forward

        y = empty_nhwc(x, _shape(x, windows, stride))
        for out, window, dilation in _branches(y, windows, dilations):
            depthwise_forward(x, window, dilation=dilation, stride=stride, relu=True, out=out)
        return y
    from lgcnet_fast.kernels.depthwise import ForwardConfig, depthwise_multi

    default = ForwardConfig.default(_shape(x, windows, stride), dilations, stride)
    config = _tuned(default, "forward", x, windows, dilations, stride)
    return depthwise_multi(x, windows, dilations, stride, relu=True, config=config)


def depthwise_gradients(
    backend: str, dy: Tensor, x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `filtered_maps` to x and, in the accumulator's dtype, to the windows."""
    if backend == "cuda":
        return _cuda_gradients(dy, x, windows, dilations, stride)
    if dy.shape[:2] == (1, 1):
        return _gradients_of_one(dy, x, windows, dilations, stride)
    from lgcnet_fast.kernels.depthwise_input_grad import (
        InputGradConfig,
        depthwise_multi_input_grad,
    )
    from lgcnet_fast.kernels.depthwise_weight_grad import (
        WeightGradConfig,
        depthwise_multi_weight_grad,
    )

    launch = (x, windows, dilations, stride)
    for_input = _tuned(InputGradConfig.default(tuple(dy.shape), stride), "input_grad", *launch)
    default = WeightGradConfig.default(tuple(dy.shape), dilations, stride)
    for_weight = _tuned(default, "weight_grad", *launch)
    dx, dw = side_by_side(
        x.device,
        [
            lambda: depthwise_multi_input_grad(dy, *launch, relu=True, config=for_input),
            lambda: depthwise_multi_weight_grad(dy, *launch, relu=True, config=for_weight),
        ],
    )
    return dx, dw


def _gradients_of_one(
    dy: Tensor, x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> tuple[Tensor, Tensor]:
    """Of a single branch, from one launch where the stride divides the dilation."""
    from lgcnet_fast.kernels.depthwise_backward import depthwise_backward
    from lgcnet_fast.kernels.depthwise_weight_grad import WeightGradConfig

    default = WeightGradConfig.default(tuple(dy.shape), dilations, stride)
    config = _tuned(default, "backward", x, windows, dilations, stride)
    branch = (dy[0, 0], x, windows[0, 0], dilations[0], stride)
    dx, dw = depthwise_backward(*branch, relu=True, config=config)
    return dx, dw[None, None]


def _cuda_gradients(
    dy: Tensor, x: Tensor, windows: Tensor, dilations: Sequence[int], stride: int
) -> tuple[Tensor, Tensor]:
    from lgcnet_fast.native.depthwise import depthwise_backward

    dx, dws = None, []
    for g, window, dilation in _branches(dy, windows, dilations):
        settings: dict[str, Any] = {"dilation": dilation, "stride": stride, "relu": True}
        dx, dw = depthwise_backward(x, window, g, out=dx, accumulate=dx is not None, **settings)
        dws.append(dw)
    assert dx is not None
    return dx, torch.stack(dws).view_as(windows)


def _branches(
    maps: Tensor, windows: Tensor, dilations: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Map, window and dilation of each branch; CUDA kernels read aligned float32 windows."""
    every = zip(maps.flatten(0, 1), windows.float().flatten(0, 1), strict=True)
    for branch, (branch_map, window) in enumerate(every):
        aligned = window if window.data_ptr() % 16 == 0 else window.clone()
        yield branch_map, aligned, dilations[branch % len(dilations)]


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
