"""Launchers of csrc/separable.cuh: ReLU, depthwise and pointwise convolution, bias, one launch.

For inference, with batch norms folded into the pointwise weights and the bias. Least traffic: x and
y once, y twice where it is added to; 2 C_in C_out operations a pixel, 18 C_in for the window.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.depthwise import even_pixels, walks
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import (
    STORAGE,
    VIEW,
    check_dense,
    check_map,
    check_output,
    empty_map,
    pack,
    view_of,
    widest_vector,
)

ARGUMENTS = np.dtype(
    [
        ("x", VIEW),
        ("y", VIEW),
        *[(name, "u8") for name in ("depthwise", "pointwise", "bias")],
        ("in_channels", "i4"),
        ("out_channels", "i4"),
        *[(f"{side}_{axis}", "i4") for side in ("in", "out") for axis in ("height", "width")],
        *[(name, "i4") for name in ("dilation", "relu", "accumulate", "output_tiles")],
    ],
    align=True,
)

COLUMNS, ROWS = 16, 4
"""kPixelColumns and kPixelRows of the kernel."""
BLOCK = (8, COLUMNS, 1)


def separable_forward(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    stride: int = 1,
    relu: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    width: int | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """bias + pointwise product of the depthwise convolution of x or relu(x), padding = dilation.

    x: (N, C_in, H, W) float32, float16 or bfloat16, NHWC or a slice of its channels; depthwise:
    (3, 3, C_in), pointwise: (C_in, C_out), bias: (C_out,), float32, contiguous; the result and
    `out`: (N, C_out, ceil(H / stride), ceil(W / stride)) in the dtype of x. With `accumulate` the
    result is added to `out`. `width`: outputs a block, 32 or 64. Raises `ValueError` for arguments
    that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    check_map("x", x, launcher)
    check_dense("depthwise", depthwise, (3, 3, x.shape[1]), torch.float32, x.device)
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride} is neither 1 nor 2")
    if not 1 <= dilation < 2**15:
        raise ValueError(f"dilation: {dilation} is not between 1 and {2**15 - 1}")
    size = (-(-x.shape[2] // stride), -(-x.shape[3] // stride))
    y, bias = _checked(x, pointwise, bias, size, out, accumulate)
    seen, dilation, stride = even_pixels(x, dilation, stride)
    geometry = (stride, 9, dilation, relu, accumulate)
    _launch(seen, depthwise, pointwise, bias, y, geometry, width, launcher)
    return y


def pointwise_forward(
    x: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    width: int | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """bias + pointwise product of x, or of relu(x); arguments as in `separable_forward`.

    A stride is a matter of which pixels x is a view of.
    """
    launcher = launcher or load()
    check_map("x", x, launcher)
    y, bias = _checked(x, pointwise, bias, (x.shape[2], x.shape[3]), out, accumulate)
    _launch(x, bias, pointwise, bias, y, (1, 1, 1, relu, accumulate), width, launcher)
    return y


def _checked(
    x: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    out: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """The map to write and the bias."""
    if pointwise.ndim != 2:
        raise ValueError(f"pointwise: shape {tuple(pointwise.shape)}, need (C_in, C_out)")
    shape = (x.shape[1], pointwise.shape[1])
    check_dense("pointwise", pointwise, shape, torch.float32, x.device)
    if bias is None:
        bias = pointwise.new_zeros(shape[1])
    check_dense("bias", bias, shape[1:], torch.float32, x.device)
    if out is None:
        if accumulate:
            raise ValueError("accumulate: there is no `out` to add to")
        return empty_map((x.shape[0], shape[1], *size), x), bias
    check_output("out", out, (x.shape[0], shape[1], *size), x)
    return out, bias


def _launch(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor,
    y: Tensor,
    geometry: tuple[int, int, int, bool, bool],
    width: int | None,
    launcher: Launcher,
) -> None:
    """geometry: stride, taps, dilation, relu, accumulate."""
    stride, taps, dilation, relu, accumulate = geometry
    aligned = all(one.data_ptr() % 16 == 0 for one in (depthwise, bias))
    vector = widest_vector((4, 1) if aligned else (1,), x, y)
    images, outputs, height, columns = y.shape
    tiles = (-(-columns // COLUMNS), walks(height, dilation, ROWS))
    if width is None:
        wide = outputs > 32 and vector == 4
        enough = images * tiles[0] * tiles[1] * -(-outputs // 64) >= 2 * launcher.processors(
            x.device
        )
        width = 64 if wide and enough else 32
    instance = instances.separable(STORAGE[x.dtype], vector, stride, taps, width)
    if instance not in instances.all_instances():
        raise ValueError(f"width: {width} has no compiled kernel {instance.expression}")
    output_tiles = -(-outputs // width)
    grid = (*tiles, images * output_tiles)
    check_grid("separable", grid)
    fields = (
        *(view_of(x), view_of(y), depthwise.data_ptr(), pointwise.data_ptr(), bias.data_ptr()),
        *(x.shape[1], outputs, *x.shape[2:], height, columns),
        *(dilation, int(relu), int(accumulate), output_tiles),
    )
    launcher.launch(instance, grid, BLOCK, pack(ARGUMENTS, fields), x.device)
