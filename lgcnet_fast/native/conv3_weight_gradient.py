"""Launcher of csrc/conv3_weight_gradient.cuh: weight gradients of dense 3x3 convolutions.

For 16-bit storage on sm_90, by the extension, see native/hopper.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native import hopper, instances
from lgcnet_fast.native.hopper import MOST_SHARED, TENSOR_MAP, rounded_up, tensor_map
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import STORAGE, check_dense_maps, check_same, empty_floats

THREADS = 512
MOST_CONVOLUTIONS = 12
BARRIERS = 1024
"""kConv3Threads, kMostConvolutions and kRing, in bytes, of the kernel."""
MOST_PAIRS = BARRIERS // 16
"""Whose barriers have room."""

CHANNELS = 64
"""Of a position in shared memory; of x, a block's."""
STEP = 16
"""Positions of a product, and what channels must be a multiple of."""
FEWEST_POSITIONS = 1024
"""Of a block, where there are so many: to begin and to hand over its sums takes a block as long as
some 800 positions, and its multiprocessor is wanted by what runs beside."""
WIDEST = 112
"""Columns of a walk, so that three pairs of rows fit shared memory."""

ARGUMENTS = np.dtype(
    {
        "names": ["x", "dy", "shares", "convolutions", "channels", "out_channels", "step"]
        + ["height", "width", "images", "columns", "rows", "programs", "ring", "relu"],
        "formats": [(TENSOR_MAP, MOST_CONVOLUTIONS)] * 2 + ["u8"] + ["i4"] * 12,
        "offsets": [0, 1536, 3072, *range(3080, 3128, 4)],
        "itemsize": 3136,
    }
)


@dataclass(frozen=True)
class Plan:
    """How blocks go over convolutions of one size; see struct Conv3GradientArguments."""

    out_block: int
    """One of OUT_BLOCKS."""
    step: int
    columns: int
    rows: int
    programs: int
    ring: int
    blocks: int
    """Of channels, of both kinds: of a program, of a convolution."""

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return BARRIERS + self.ring * _pair_bytes(self.columns)


@cache
def plan(
    convolutions: int, shape: tuple[int, int, int, int], out_channels: int, processors: int
) -> Plan:
    """For maps x of this shape, (N, C, H, W), so that each block has a multiprocessor at once.

    Of walks, which share the positions, each loads a pair of rows of dy more than of x.
    """
    images, channels, height, width = shape
    out_block = min(
        instances.OUT_BLOCKS, key=lambda block: (rounded_up(out_channels, block), -block)
    )
    blocks_c = -(-channels // CHANNELS)
    blocks = blocks_c * -(-out_channels // out_block)
    columns = min(range(STEP, WIDEST + 1, STEP), key=lambda step: (rounded_up(width, step), -step))
    strips = images * -(-width // columns)
    most = min(processors // (convolutions * blocks), images * height * width // FEWEST_POSITIONS)

    def of_a_program(rows: int) -> int:
        return -(-strips * -(-height // rows) // max(1, most))

    rows = min(
        range(2, rounded_up(height, 2) + 1, 2), key=lambda rows: of_a_program(rows) * (rows + 2)
    )
    programs = -(-strips * -(-height // rows) // of_a_program(rows))
    pairs = of_a_program(rows) * (rows // 2 + 1)
    ring = min(pairs, MOST_PAIRS, (MOST_SHARED - BARRIERS) // _pair_bytes(columns))
    step = rounded_up(-(-channels // blocks_c), STEP)
    return Plan(out_block, step, columns, rows, programs, ring, blocks)


def _pair_bytes(columns: int) -> int:
    """Of shared memory for two rows of x and of dy."""
    row = 2 * CHANNELS
    return 2 * columns * row + rounded_up(2 * (columns + 2) * row, 1024)


def refusal(dys: Sequence[Tensor], xs: Sequence[Tensor]) -> str | None:
    """Why the kernel cannot serve these; see `conv3_weight_gradient`."""
    reason = hopper.refusal((*dys, *xs))
    if reason is not None:
        return reason
    if len(xs) > MOST_CONVOLUTIONS:
        return f"{len(xs)} convolutions, at most {MOST_CONVOLUTIONS}"
    for one in (dys[0], xs[0]):
        if one.shape[1] % STEP:
            return f"{one.shape[1]} channels, not a multiple of {STEP}"
    return None


def conv3_weight_gradient(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    *,
    relu: bool = False,
    launcher: Launcher | None = None,
) -> Tensor:
    """Shares (S, B, C_out, 3, 3, C), float32, of the weight gradients, whose sum they are.

    dys: the gradients of B convolutions, (N, C_out, H, W); xs: their maps, (N, C, H, W); all dense
    NHWC, of one dtype, channels multiples of 16; relu: the convolutions are of relu(x). Same bits
    on every run. Raises `ValueError` naming the argument at fault, `DeviceError` where the route
    has no such kernel.
    """
    launcher = launcher or load()
    if not launcher.hopper:
        raise DeviceError(f"{launcher.route}: holds no code for sm_90, see docs/native.md")
    if not xs or len(dys) != len(xs):
        raise ValueError(f"dys: {len(dys)} maps, xs: {len(xs)}, need as many and at least one")
    check_dense_maps("xs", xs, xs[0], launcher)
    images, channels, height, width = xs[0].shape
    check_dense_maps("dys", dys, dys[0], launcher)
    out_channels = dys[0].shape[1]
    wanted = images, out_channels, height, width
    check_same("dys[0]", dys[0], wanted, xs[0].dtype, xs[0].device)
    reason = refusal(dys, xs)
    if reason is not None:
        raise ValueError(f"xs: no kernel for this, {reason}")
    shape = images, channels, height, width
    found = plan(len(xs), shape, out_channels, launcher.processors(xs[0].device))
    shares = empty_floats(xs[0], found.programs, len(xs), out_channels, 3, 3, channels)
    arguments = np.zeros(1, ARGUMENTS)
    one = arguments[0]
    for at, (dy, x) in enumerate(zip(dys, xs, strict=True)):
        one["x"][at] = tensor_map(x, CHANNELS, found.columns, 2)
        one["dy"][at] = tensor_map(dy, CHANNELS, found.columns + 2, 2)
    one["shares"], one["convolutions"], one["relu"] = shares.data_ptr(), len(xs), relu
    one["images"], one["channels"], one["height"], one["width"] = shape
    one["out_channels"] = out_channels
    for name in ("step", "columns", "rows", "programs", "ring"):
        one[name] = getattr(found, name)
    instance = instances.conv3_weight_gradient(STORAGE[xs[0].dtype], found.out_block)
    grid = (found.programs * len(xs) * found.blocks, 1, 1)
    check_grid("xs", grid)
    launcher.launch(instance, grid, (THREADS, 1, 1), arguments, xs[0].device, found.shared)
    return shares
