"""Launchers of csrc/depthwise.cuh: depthwise 3x3 convolution with dilation, forward and backward.

Reading and writing each map once is the floor: x + y forward, x + dy + dx backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.gradient_sum import MOST_GRADIENTS, gradient_sum
from lgcnet_fast.native.instances import Instance
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import (
    STORAGE,
    VIEW,
    block_of,
    check_map,
    check_output,
    check_same,
    empty_map,
    pack,
    view_of,
    widest_vector,
)
from lgcnet_fast.native.sums import sum_partials

BRANCHES_A_LAUNCH = 16
"""kBranchesALaunch of the kernels."""
APART = 2**21
"""Values of a map up to which branches give a gradient of x each, in one launch, which are added up
then. Gradients of larger maps take longer to write and read again than a launch for each branch,
which adds to what the others gave, has to wait. Where the two meet was not measured."""

_SIZES = [(f"{side}_{axis}", "i4") for side in ("in", "out") for axis in ("height", "width")]
_BRANCHES = (BRANCHES_A_LAUNCH,)

FORWARD_ARGUMENTS = np.dtype(
    [
        ("x", VIEW),
        ("y", VIEW),
        ("ys", "u8", _BRANCHES),
        ("weight", "u8", _BRANCHES),
        ("dilation", "i4", _BRANCHES),
        ("images", "i4"),
        ("channels", "i4"),
        *_SIZES,
        ("relu", "i4"),
        ("channel_tiles", "i4"),
    ],
    align=True,
)

BACKWARD_ARGUMENTS = np.dtype(
    [
        ("x", VIEW),
        ("dy", VIEW),
        ("dx", VIEW),
        ("dys", "u8", _BRANCHES),
        ("dxs", "u8", _BRANCHES),
        ("weight", "u8", _BRANCHES),
        ("partial", "u8"),
        ("dilation", "i4", _BRANCHES),
        ("row_groups", "i4", _BRANCHES),
        ("images", "i4"),
        ("channels", "i4"),
        *_SIZES,
        ("relu", "i4"),
        ("accumulate", "i4"),
        ("channel_tiles", "i4"),
    ],
    align=True,
)

BACKWARD_THREADS = 256
"""kBackwardThreads of the kernels: the most that a block may have."""


@dataclass(frozen=True)
class Tile:
    """How a launch divides the work."""

    vector: int
    """Channels a thread."""
    columns: int
    rows: int
    """Outputs that a thread walks over, `rows` x `columns`, each a dilation apart."""
    threads: int
    """Threads a block, at most."""
    blocks: int = 4
    """Backward: blocks a multiprocessor; each block writes one partial weight gradient."""


class _Branches(NamedTuple):
    """Convolutions of one map."""

    weights: Sequence[Tensor]
    dilations: Sequence[int]
    stride: int
    relu: bool

    def some(self, places: Sequence[int]) -> _Branches:
        weights, dilations = ([every[at] for at in places] for every in self[:2])
        return self._replace(weights=weights, dilations=dilations)

    def seen(self, x: Tensor) -> tuple[Tensor, list[int], int]:
        """x, dilations and stride for the kernels; the dilations all even at stride 2, or odd."""
        seen, _, stride = even_pixels(x, self.dilations[0], self.stride)
        halved = 2 if stride != self.stride else 1
        return seen, [dilation // halved for dilation in self.dilations], stride


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    *,
    dilation: int = 1,
    stride: int = 1,
    relu: bool = False,
    out: Tensor | None = None,
    tile: Tile | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """y = depthwise convolution of x, or of relu(x), with padding = dilation.

    x: (N, C, H, W) float32, float16 or bfloat16, NHWC or a slice of its channels; weight: (3, 3, C)
    float32, contiguous; y and `out`: (N, C, ceil(H / stride), ceil(W / stride)) in the dtype of x.
    Raises `ValueError` for arguments that do not fit, `DeviceError` without a route.
    """
    launcher = launcher or load()
    shape = _check(x, weight, dilation, stride, launcher)
    y = empty_map(shape, x) if out is None else out
    if out is not None:
        check_output("out", out, shape, x)
    _forward(x, _Branches([weight], [dilation], stride, relu), [y], launcher, tile)
    return y


def branches_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    out: Tensor,
    *,
    stride: int = 1,
    relu: bool = False,
    launcher: Launcher | None = None,
) -> None:
    """`depthwise_forward` of x by B windows, in as few launches as their dilations allow.

    out: the results, (B, N, C, H', W'), each NHWC. Raises as `depthwise_forward`.
    """
    launcher = launcher or load()
    _check_branches(weights, dilations, out=out)
    for weight, dilation, y in zip(weights, dilations, out, strict=True):
        check_output("out", y, _check(x, weight, dilation, stride, launcher), x)
    branches = _Branches(weights, dilations, stride, relu)
    for places in _launches(dilations, stride):
        _forward(x, branches.some(places), [out[at] for at in places], launcher)


def depthwise_backward(
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    *,
    dilation: int = 1,
    stride: int = 1,
    relu: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    tile: Tile | None = None,
    launcher: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `depthwise_forward` to x and weight, in one pass over x and dy.

    dy: as y there; `out` takes dx, added to what it holds with `accumulate`, as for the branches of
    one x. Returns dx, shaped and typed as x, and dw, (3, 3, C) float32. The same inputs give the
    same bits on the same kind of GPU. Raises as `depthwise_forward`.
    """
    launcher = launcher or load()
    shape = _check(x, weight, dilation, stride, launcher)
    _check_gradient(dy, shape, x, launcher)
    if out is None and accumulate:
        raise ValueError("accumulate: there is no `out` to add to")
    dx = empty_map(tuple(x.shape), x) if out is None else out
    if out is not None:
        check_output("out", out, tuple(x.shape), x)
    branches = _Branches([weight], [dilation], stride, relu)
    dw = _backward(x, branches, [dy], [dx], launcher, accumulate, tile)
    return dx, dw[0]


def branches_backward(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    dys: Tensor,
    *,
    stride: int = 1,
    relu: bool = False,
    launcher: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `branches_forward` to x and to the windows, (B, 3, 3, C) float32.

    dys: as `out` there. That of x is rounded to its dtype for each branch. Raises as
    `depthwise_forward`.
    """
    launcher = launcher or load()
    _check_branches(weights, dilations, dys=dys)
    for weight, dilation, dy in zip(weights, dilations, dys, strict=True):
        _check_gradient(dy, _check(x, weight, dilation, stride, launcher), x, launcher)
    dx = empty_map(tuple(x.shape), x)
    branches = _Branches(weights, dilations, stride, relu)
    if stride == 1 and 1 < len(weights) and x.numel() <= APART:
        images, channels, height, width = x.shape
        memory = x.new_empty(len(weights), images, height, width, channels)
        dxs = memory.movedim(-1, 2)
        dws = []
        for places in _launches(dilations, stride):
            maps = ([every[at] for at in places] for every in (dys, dxs))
            dws.append(_backward(x, branches.some(places), *maps, launcher))
        gradient_sum(dxs[:MOST_GRADIENTS], dx, relu=False, out=dx, launcher=launcher)
        for one in dxs[MOST_GRADIENTS:]:
            dx += one
    else:
        dws = [
            _backward(x, branches.some([at]), [dy], [dx], launcher, accumulate=at > 0)
            for at, dy in enumerate(dys)
        ]
    return dx, torch.cat(dws) if len(dws) > 1 else dws[0]


def _forward(
    x: Tensor,
    branches: _Branches,
    ys: Sequence[Tensor],
    launcher: Launcher,
    tile: Tile | None = None,
) -> None:
    """One launch, to `ys`."""
    seen, dilations, stride = branches.seen(x)
    tile = tile or forward_tile(seen, *ys)
    instance = instances.depthwise_forward(
        STORAGE[x.dtype], tile.vector, stride, tile.columns, tile.rows
    )
    _check_tile(tile, instance, _forward_threads(x.dtype, tile.vector), seen, *ys)

    images, channels, height, width = ys[0].shape
    across, pixels, tiles = block_of(channels // tile.vector, tile.threads)
    grid = (
        -(-max(walks(width, dilation, tile.columns) for dilation in dilations) // pixels),
        max(walks(height, dilation, tile.rows) for dilation in dilations),
        len(ys) * images * tiles,
    )
    check_grid("depthwise_forward", grid)
    fields = (
        *(view_of(seen), view_of(ys[0]), _of_branches(y.data_ptr() for y in ys)),
        *(_of_branches(weight.data_ptr() for weight in branches.weights), _of_branches(dilations)),
        *(images, channels, *seen.shape[2:], height, width, int(branches.relu), tiles),
    )
    arguments = pack(FORWARD_ARGUMENTS, fields)
    launcher.launch(instance, grid, (across, pixels, 1), arguments, x.device)


def _backward(
    x: Tensor,
    branches: _Branches,
    dys: Sequence[Tensor],
    dxs: Sequence[Tensor],
    launcher: Launcher,
    accumulate: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """One launch: the gradients of x to `dxs`, those of the windows, (B, 3, 3, C), returned."""
    seen, dilations, stride = branches.seen(x)
    written = list(dxs)
    if stride != branches.stride:  # the other pixels have no gradient
        written = [(dx if accumulate else dx.zero_())[:, :, ::2, ::2] for dx in dxs]
    tile = tile or backward_tile(seen, *dys, *written, stride=stride)
    instance = _backward_instance(STORAGE[x.dtype], tile, stride)
    _check_tile(tile, instance, BACKWARD_THREADS, seen, *dys, *written)

    images, channels, height, width = seen.shape
    if stride == 2:  # walks of one 2 x 2 square
        columns, rows = -(-width // 2), [-(-height // 2)] * len(dys)
    else:
        columns = max(walks(width, dilation, tile.columns) for dilation in dilations)
        rows = [walks(height, dilation, tile.rows) for dilation in dilations]
    across, pixels, tiles = block_of(channels // tile.vector, tile.threads)
    column_blocks = -(-columns // pixels)
    # Several branches: more of them, so that the last ones leave little of the GPU idle.
    blocks = launcher.processors(x.device) * tile.blocks * min(len(dys), 4)
    workers = min(-(-blocks // (column_blocks * tiles * len(dys))), images * max(rows))
    grid = (column_blocks, workers, tiles * len(dys))
    check_grid("depthwise_backward", grid)
    weights = branches.weights
    partial = weights[0].new_empty(len(dys), workers * column_blocks, 3, 3, channels)
    flags = int(branches.relu), int(accumulate)
    fields = (
        *(view_of(seen), view_of(dys[0]), view_of(written[0])),
        *(_of_branches(one.data_ptr() for one in several) for several in (dys, written, weights)),
        *(partial.data_ptr(), _of_branches(dilations), _of_branches(rows)),
        *(images, channels, height, width, *dys[0].shape[2:], *flags, tiles),
    )
    arguments = pack(BACKWARD_ARGUMENTS, fields)
    launcher.launch(instance, grid, (across, pixels, 1), arguments, x.device)
    return sum_partials(partial, launcher, groups=True)


def _of_branches(numbers: Iterable[int]) -> list[int]:
    found = list(numbers)
    return found + [0] * (BRANCHES_A_LAUNCH - len(found))


def _launches(dilations: Sequence[int], stride: int) -> list[Sequence[int]]:
    """Places of the branches that one launch serves: in their order at stride 1."""
    places = range(len(dilations))
    alike: list[Sequence[int]] = [places]
    if stride == 2:
        alike = [[at for at in places if dilations[at] % 2 == odd] for odd in (0, 1)]
    return [
        some[first : first + BRANCHES_A_LAUNCH]
        for some in alike
        for first in range(0, len(some), BRANCHES_A_LAUNCH)
    ]


def forward_tile(x: Tensor, *ys: Tensor) -> Tile:
    """Default division of the forward: 8 bytes of channels a thread, 4 x 2 outputs a walk."""
    _, narrow, single = instances.vectors(STORAGE[x.dtype])
    return Tile(widest_vector((narrow, single), x, *ys), columns=2, rows=4, threads=256)


def backward_tile(x: Tensor, *maps: Tensor, stride: int) -> Tile:
    """Default division of the backward: narrower vectors, for it holds 18 numbers a channel."""
    vector = widest_vector((2, 1), x, *maps)
    return Tile(vector, columns=1 if stride == 2 else 2, rows=4, threads=128)


def _check(
    x: Tensor, weight: Tensor, dilation: int, stride: int, launcher: Launcher
) -> tuple[int, int, int, int]:
    """The shape of the output."""
    check_map("x", x, launcher)
    images, channels, height, width = x.shape
    check_same("weight", weight, (3, 3, channels), torch.float32, x.device)
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        raise ValueError(f"weight: strides {weight.stride()}, need a contiguous, aligned tensor")
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride} is neither 1 nor 2")
    if not 1 <= dilation < 2**15:
        raise ValueError(f"dilation: {dilation} is not between 1 and {2**15 - 1}")
    return images, channels, -(-height // stride), -(-width // stride)


def _check_gradient(
    dy: Tensor, shape: tuple[int, int, int, int], x: Tensor, launcher: Launcher
) -> None:
    check_map("dy", dy, launcher)
    check_same("dy", dy, shape, x.dtype, x.device)


def _check_branches(weights: Sequence[Tensor], dilations: Sequence[int], **maps: Tensor) -> None:
    """maps: by name, a stack of one map a branch."""
    ((name, stack),) = maps.items()
    if stack.ndim != 5:
        raise ValueError(f"{name}: shape {tuple(stack.shape)}, need maps (B, N, C, H, W)")
    if not len(weights) == len(dilations) == len(stack) > 0:
        raise ValueError(
            f"{name}: {len(stack)} maps for {len(weights)} weights and {len(dilations)} dilations"
        )


def _forward_threads(dtype: torch.dtype, vector: int) -> int:
    """kForwardThreads of the kernels."""
    return 256 if vector * dtype.itemsize > 8 else 512


def _check_tile(tile: Tile, instance: Instance, threads: int, *maps: Tensor) -> None:
    if instance not in instances.all_instances():
        raise ValueError(f"tile: {tile} has no compiled kernel {instance.expression}")
    if not 1 <= tile.threads <= threads or tile.blocks < 1:
        raise ValueError(f"tile: {tile} needs 1 to {threads} threads and some blocks")
    widest_vector((tile.vector,), *maps)


def even_pixels(x: Tensor, dilation: int, stride: int) -> tuple[Tensor, int, int]:
    """(x, dilation, stride) of an equal convolution that skips no input.

    At stride 2 and even dilation every tap falls on even rows and columns, so that the convolution
    is one of stride 1 and half the dilation over those.
    """
    if stride == 2 and dilation % 2 == 0:
        return x[:, :, ::2, ::2], dilation // 2, 1
    return x, dilation, stride


def walks(extent: int, dilation: int, length: int) -> int:
    """Walks of `length` positions, a dilation apart, that cover an axis."""
    phases = min(dilation, extent)
    positions = -(-extent // dilation)
    return phases * -(-positions // length)


def _backward_instance(storage: str, tile: Tile, stride: int) -> Instance:
    if stride == 2:
        return instances.depthwise_backward_stride2(storage, tile.vector)
    return instances.depthwise_backward(storage, tile.vector, tile.columns, tile.rows)
