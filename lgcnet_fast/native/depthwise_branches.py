"""Launcher of csrc/depthwise_branches.cuh: both gradients of the depthwise branches of a map.

For 16-bit storage on sm_90, by the extension: what compiles at run time leaves Hopper's own
instructions out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, permutations

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native import hopper, instances
from lgcnet_fast.native.hopper import MOST_SHARED, TENSOR_MAP, rounded_up, tensor_map
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import (
    STORAGE,
    check_dense,
    check_dense_maps,
    empty_floats,
    empty_map,
)

THREADS = 512
MOST_BRANCHES = 16
STRIP_OF_X = 18_688
"""kBranchThreads, kMostBranches and kStripOfX of the kernel, the latter in bytes."""

GROUP = 16
"""Channels of a block."""
TILE = 8
"""Rows and columns of a tile of a warpgroup."""
LONGEST_CHAIN = 4
"""Rows of dw that a warp takes at a time, at most: as the kernel's loop is unrolled."""
ORDERS = 120
"""Of dilations that a plan looks at: all of up to five."""
STRIP = np.dtype(
    {
        "names": ["map", "room", "branch", "dilation", "width", "chain", "chains", "loaded"],
        "formats": [TENSOR_MAP, "u4", *["i4"] * 6],
        "offsets": [0, *range(128, 156, 4)],
        "itemsize": 192,
    }
)
ARGUMENTS = np.dtype(
    {
        "names": ["x", "strips", "dx", "weights", "shares"]
        + ["branches", "channels", "height", "width", "rows"],
        "formats": [TENSOR_MAP, (STRIP, MOST_BRANCHES), *["u8"] * 3, *["i4"] * 5],
        "offsets": [0, 128, *range(3200, 3224, 8), *range(3224, 3244, 4)],
        "itemsize": 3264,
    }
)


@dataclass(frozen=True)
class Strip:
    """A strip of a gradient in shared memory, see struct BranchStrip of the kernel."""

    room: int
    branch: int
    dilation: int
    width: int
    chain: int
    chains: int
    loaded: int


@dataclass(frozen=True)
class Plan:
    """How blocks go through the branches of maps of one size."""

    rows: int
    """Of a strip."""
    tiles: int
    """For each warpgroup, one of BRANCH_TILES."""
    strips: tuple[Strip, ...]
    shared: int
    """Bytes of shared memory."""


@cache
def plan(height: int, width: int, dilations: tuple[int, ...]) -> Plan | None:
    """For branches of these dilations; None where no strip fits shared memory or registers."""
    columns = rounded_up(width, GROUP)
    for rows in (16, 8) if height > 8 else (8,):
        tiles = -(-(rows // TILE) * -(-width // TILE) // (THREADS // 128))
        fitting = [most for most in instances.BRANCH_TILES if tiles <= most]
        widths = {d: rounded_up(columns + 2 * d, TILE) for d in dilations}
        sizes = {d: (rows + 2 * d) * widths[d] * 2 * GROUP for d in dilations}
        x_bytes = rows * columns * 2 * GROUP
        begin = STRIP_OF_X + x_bytes
        space = MOST_SHARED - begin
        if not fitting or max(sizes.values()) > space:
            continue
        orders = [
            [branch for d in distinct for branch, own in enumerate(dilations) if own == d]
            for distinct in islice(permutations(sorted(sizes)), ORDERS)
        ]
        order = min(
            orders, key=lambda order: _end([sizes[dilations[k]] for k in order], space, x_bytes)
        )
        in_order = [sizes[dilations[branch]] for branch in order]
        rooms, loaded = rooms_of(in_order, space)
        strips = []
        for at, branch in enumerate(order):
            d = dilations[branch]
            length = -(-rows // d)
            chain = min(LONGEST_CHAIN, length)
            strips.append(
                Strip(rooms[at], branch, d, widths[d], chain, -(-length // chain), loaded[at])
            )
        used = max(room + size for room, size in zip(rooms, in_order, strict=True))
        return Plan(rows, fitting[0], tuple(strips), begin + used)
    return None


def rooms_of(sizes: Sequence[int], space: int) -> tuple[list[int], list[int]]:
    """Where strips of these sizes go in `space`, and how many are loaded when each is worked on.

    Each goes where it fits first beside those that are still needed, as early as it fits anywhere.
    None is larger than the space.
    """
    rooms: list[int] = []
    loaded = []
    for at in range(len(sizes)):
        while len(rooms) < len(sizes):
            room = 0
            for other in sorted(range(at, len(rooms)), key=lambda k: rooms[k]):
                if room + sizes[len(rooms)] <= rooms[other]:
                    break
                room = rooms[other] + sizes[other]
            if room + sizes[len(rooms)] > space:
                break
            rooms.append(room)
        loaded.append(len(rooms))
    return rooms, loaded


def _end(sizes: Sequence[int], space: int, work: int) -> int:
    """When the last strip is done with, if a byte takes 1 to load and a strip `work` to work on."""
    _, loaded = rooms_of(sizes, space)
    now, arrivals = 0, [0]
    for at in range(len(sizes)):
        for size in sizes[len(arrivals) - 1 : loaded[at]]:
            arrivals.append(max(arrivals[-1], now) + size)
        now = max(now, arrivals[at + 1]) + work
    return now


def refusal(dys: Sequence[Tensor], x: Tensor, dilations: Sequence[int], stride: int) -> str | None:
    """Why the kernel cannot serve these; see `depthwise_branches_backward`."""
    reason = hopper.refusal((x, *dys))
    if reason is not None:
        return reason
    if stride != 1:
        return f"stride {stride}"
    if len(dys) > MOST_BRANCHES:
        return f"{len(dys)} branches, at most {MOST_BRANCHES}"
    if x.shape[1] % GROUP:
        return f"{x.shape[1]} channels, not a multiple of {GROUP}"
    if _plan(dys, x, dilations) is None:
        return f"a strip of {x.shape[3]} columns does not fit shared memory"
    return None


def depthwise_branches_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    windows: Tensor,
    dilations: Sequence[int],
    *,
    launcher: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of depthwise 3x3 convolutions of relu(x), of stride 1.

    dys: of each map, edge after edge, like x: (N, C, H, W), dense NHWC, C a multiple of 16;
    windows: (edges, B, 3, 3, C), float32, contiguous; dilations: B of them. Returns that of x and
    shares of those of the windows, (S, edges, B, 3, 3, C), whose sum they are. Same bits on every
    run. Raises `ValueError` naming the argument at fault, `DeviceError` where the route has no such
    kernel.
    """
    launcher = launcher or load()
    if not launcher.hopper:
        raise DeviceError(f"{launcher.route}: holds no code for sm_90, see docs/native.md")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations: {tuple(dilations)}, need at least one, from 1 on")
    if not dys or len(dys) % len(dilations):
        raise ValueError(f"dys: {len(dys)} maps of branches of {len(dilations)} dilations")
    check_dense_maps("x", [x], x, launcher)
    check_dense_maps("dys", dys, x, launcher)
    edges, branches = len(dys) // len(dilations), len(dilations)
    shape = (edges, branches, 3, 3, x.shape[1])
    check_dense("windows", windows, shape, torch.float32, x.device)
    reason = refusal(dys, x, dilations, 1)
    if reason is not None:
        raise ValueError(f"x: no kernel for this, {reason}")
    found = _plan(dys, x, dilations)
    assert found is not None
    images, channels, height, width = x.shape
    dx = empty_map(tuple(x.shape), x)
    shares = empty_floats(x, images * -(-height // found.rows), *shape)
    arguments = np.zeros(1, ARGUMENTS)
    one = arguments[0]
    one["x"] = tensor_map(x, GROUP, rounded_up(width, GROUP), found.rows)
    for place, strip in zip(one["strips"], found.strips, strict=False):
        for name in STRIP.names[1:]:
            place[name] = getattr(strip, name)
        rows = found.rows + 2 * strip.dilation
        place["map"] = tensor_map(dys[strip.branch], GROUP, strip.width, rows)
    one["dx"], one["weights"], one["shares"] = (t.data_ptr() for t in (dx, windows, shares))
    one["branches"], one["rows"] = len(dys), found.rows
    one["channels"], one["height"], one["width"] = channels, height, width
    instance = instances.depthwise_branches_backward(STORAGE[x.dtype], found.tiles)
    grid = (len(shares) * (channels // GROUP), 1, 1)
    check_grid("x", grid)
    launcher.launch(instance, grid, (THREADS, 1, 1), arguments, x.device, found.shared)
    return dx, shares


def _plan(dys: Sequence[Tensor], x: Tensor, dilations: Sequence[int]) -> Plan | None:
    of_maps = tuple(dilations) * (len(dys) // len(dilations))
    return plan(x.shape[2], x.shape[3], of_maps)
