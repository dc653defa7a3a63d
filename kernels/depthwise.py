"""Depthwise 3x3 convolution with dilation, NHWC: several branches of one input in one launch.

Branch b has dilation d_b, edge e its own weights; all of them read the same x:

    y[e, b, n, i, j, c] = sum_{u, v} w[e, b, u, v, c] r(x[n, s i + u d_b, s j + v d_b, c])

with u, v in {-1, 0, 1}, stride s, zero padding d_b, r = ReLU or the identity, and
ceil(H / s) x ceil(W / s) outputs. A batch norm before r is for normalised_depthwise.py, whose
kernels walk as these do: padding is zero behind the ReLU, so minus infinity is what lies outside x.

How the kernel saves work: output rows that lie `step` apart (d / s, or d where s does not divide
d) share input rows. A program walks down such a chain, loads the three horizontal taps of each
input row once and adds them to the up to three outputs that need them. The chains of one
dilation start at the rows 0 to step - 1, the "phases".

One walk goes on from chain to chain: a row outside the map comes before each chain, whose zeros
end the one before and begin the next. The entries of this sequence of rows are numbered from 0,
the row before the first chain; segments of it, tiles of columns and images are shared out among
programs. All columns of a tile are in the same row, so that whatever depends on rows alone is
computed once for all of them.

Least traffic, in maps of y: s^2 + E B. Arithmetic: 9 E B multiply-adds an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, empty_map
from lgcnet_fast.kernels.depthwise_arguments import check_arguments, pack
from lgcnet_fast.kernels.launches import (
    INTERPRETED,
    cuda_capability_geq,
    kernel,
    wait_for_predecessor,
)

LARGE = 2**22
"""Elements of a map that takes longer to read than programs to begin."""


AT_ONCE = tl.constexpr(3)
"""Rows of a walk whose loads are under way together."""

_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class ForwardConfig:
    """Tile of one program: about `rows` outputs of `block_p` columns and `block_c` channels."""

    rows: int
    block_p: int
    block_c: int
    warps: int

    @classmethod
    def default(
        cls, y_shape: tuple[int, ...], dilations: Sequence[int], stride: int
    ) -> ForwardConfig:
        """8 bytes of 16-bit storage a thread and load; 4 programs for each of 132 cores.

        For large maps of one branch, which need fewer registers, 12 of half the size.
        """
        edges, branches, images, channels, height, width = y_shape
        alone = edges == branches == stride == 1
        small = alone and images * channels * height * width >= LARGE
        programs, warps = (1650, 2) if small else (528, 4)
        block_p, block_c = default_block(width, channels, elements=128 * warps, spare=1 / 8)
        tiles = images * branches * triton.cdiv(width, block_p) * triton.cdiv(channels, block_c)
        return cls(share_rows(height, programs // tiles), block_p, block_c, warps)


def default_block(
    width: int, channels: int, widest: int = 64, elements: int = 512, spare: float = 0.0
) -> tuple[int, int]:
    """(columns, channels) of a tile of 2 to `elements`: few of them outside the map.

    Up to `widest` channels; where they exceed the map's by more than the part `spare`, down to 16.
    Two elements, since `ready` takes bfloat16 by the pair.
    """
    block_c = widest
    while block_c > 16 and triton.cdiv(channels, block_c) * block_c > (1 + spare) * channels:
        block_c //= 2
    block_c = min(block_c, triton.next_power_of_2(channels))
    block_p = min(elements // block_c, triton.next_power_of_2(width))
    return max(block_p, 2 // block_c), block_c


def share_rows(height: int, programs: int) -> int:
    """Rows of each of so many programs, but not fewer than 4."""
    return triton.cdiv(height, max(1, min(programs, height // 4)))


def default_rows(height: int, dilations: Sequence[int], stride: int) -> int:
    """Rows of short walks: up to 8, so that those of the longest chain are about equally long."""
    longest_chain = max(triton.cdiv(height, _step(dilation, stride)) for dilation in dilations)
    return triton.cdiv(longest_chain, triton.cdiv(longest_chain, 8))


@triton.jit
def rectify(x, RELU: tl.constexpr):
    """ReLU that keeps NaN, as PyTorch's does; the identity unless RELU."""
    if RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def dilation_of(packed, branch):
    """Byte `branch` of the packed dilations."""
    return ((packed >> (8 * branch)) & 255).to(tl.int32)


@triton.jit
def step_of(dilation, STRIDE: tl.constexpr):
    """Distance of the output rows that share input rows."""
    if STRIDE == 1:
        step = dilation
    else:
        step = tl.where(dilation % STRIDE == 0, dilation // STRIDE, dilation)
    return step


@triton.jit
def pieces_of(dilation, HO, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Pieces of ROWS outputs that the chains of one output column fall into."""
    step = step_of(dilation, STRIDE)
    return tl.minimum(step, HO) * tl.cdiv(tl.cdiv(HO, step), ROWS)


@triton.jit
def chains_of(dilation, HO, STRIDE: tl.constexpr):
    """(step, phases, rows of the longest chain) of one column."""
    step = step_of(dilation, STRIDE)
    return step, tl.minimum(step, HO), tl.cdiv(HO, step)


@triton.jit
def row_of(entry, step, phases, length):
    """Output row of an entry: negative before a chain, beyond the map where a chain is short.

    The last phase comes first, so that the row after the end of the sequence is negative too.
    """
    return phases - 1 - entry // (length + 1) + (entry % (length + 1) - 1) * step


@triton.jit
def within(index, size):
    """Whether 0 <= index < size, by one comparison."""
    return tl.cast(index, tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def ready(x, RELU: tl.constexpr, ACC: tl.constexpr):
    """What was loaded as the number to multiply: rectified, in the accumulator's dtype.

    Two bfloat16 of a register take the compiler three instructions to widen, where two suffice: a
    float32's upper half is the bfloat16. They are rectified by one instruction, where the GPU
    has it.
    """
    BFLOAT16: tl.constexpr = x.dtype == tl.bfloat16
    if BFLOAT16 and not _INTERPRETED:
        PACKED: tl.constexpr = RELU and cuda_capability_geq(8, 0)
        if PACKED:
            wide = tl.inline_asm_elementwise(
                "mov.b32 $1, 0; max.NaN.bf16x2 $1, $2, $1; "
                "shl.b32 $0, $1, 16; and.b32 $1, $1, 0xffff0000;",
                "=&r,=&r,r", [x], dtype=tl.int32, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            wide = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                "=&r,=&r,r", [x], dtype=tl.int32, is_pure=True, pack=2,
            )  # fmt: skip
        return rectify(wide.to(tl.float32, bitcast=True).to(ACC), RELU and not PACKED)
    else:
        return rectify(x.to(ACC), RELU)


@triton.jit
def prepared(x, norm, RELU: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """`ready`, with NORM behind a batch norm: (mean, inverse deviation)."""
    if NORM:
        x = rectify((ready(x, False, ACC) - norm[0]) * norm[1], RELU)
    else:
        x = ready(x, RELU, ACC)
    return x


@triton.jit
def load_weight_row(w, row: tl.constexpr, mask, C, ACC: tl.constexpr):
    """Window row `row` of the weights: (left, middle, right), each of the shape of `w`."""
    left = tl.load(w + 3 * row * C, mask=mask, other=0.0).to(ACC)
    middle = tl.load(w + (3 * row + 1) * C, mask=mask, other=0.0).to(ACC)
    right = tl.load(w + (3 * row + 2) * C, mask=mask, other=0.0).to(ACC)
    return left, middle, right


@triton.jit
def load_taps(
    x, tap, left, middle, right, norm, RELU: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr
):
    """The three horizontal taps around `x`, `tap` elements apart; left to right are masks."""
    outside: tl.constexpr = float("-inf") if NORM else 0.0
    x_left = tl.load(x - tap, mask=left, other=outside)
    x_middle = tl.load(x, mask=middle, other=outside)
    x_right = tl.load(x + tap, mask=right, other=outside)
    return (
        prepared(x_left, norm, RELU, NORM, ACC),
        prepared(x_middle, norm, RELU, NORM, ACC),
        prepared(x_right, norm, RELU, NORM, ACC),
    )


@triton.jit
def window_row(w, x, total):
    """total + the three products of one window row, as multiply-adds."""
    return total + w[0] * x[0] + w[1] * x[1] + w[2] * x[2]


@triton.jit
def _load_window_rows(
    w, row: tl.constexpr, edge_pitch, mask, C, EDGES: tl.constexpr, ACC: tl.constexpr
):
    """Window row `row` of every edge."""
    rows = ()
    for edge in tl.static_range(EDGES):
        rows = rows + (load_weight_row(w + edge * edge_pitch, row, mask, C, ACC),)
    return rows


@triton.jit
def _window_rows(w, x, totals, EDGES: tl.constexpr):
    """`window_row` for every edge."""
    rows = ()
    for edge in tl.static_range(EDGES):
        rows = rows + (window_row(w[edge], x, totals[edge]),)
    return rows


@triton.jit
def _repeat(value, EDGES: tl.constexpr):
    """(value, ...), one an edge."""
    values = ()
    for _ in tl.static_range(EDGES):
        values = values + (value,)
    return values


@triton.jit
def _store_row(y, y_edge, rows, mask, EDGES: tl.constexpr):
    """A row of outputs of every edge."""
    for edge in tl.static_range(EDGES):
        tl.store(y + edge * y_edge, rows[edge], mask=mask)


@triton.jit
def _walk(
    x, norm, w, y, column, channel, first, rows, dilation, w_edge, y_edge, H, W, HO, WO, C,
    STRIDE: tl.constexpr, HOP: tl.constexpr, EDGES: tl.constexpr, RELU: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The outputs of the `rows` entries after entry `first`, for all edges.

    x, w, y point at the image, the branch's weights and the image of y, of the first edge; w_edge
    and y_edge lead to the next one. Neighbouring outputs of a chain lie HOP input rows apart: with
    HOP = 1 an input row serves three outputs, with HOP = 2 (stride 2, odd dilation) every other
    one serves two.
    """
    step, phases, length = chains_of(dilation, HO, STRIDE)
    count = tl.maximum(tl.minimum(rows, phases * (length + 1) - 1 - first), 0)
    mask = (column < WO) & (channel < C)
    left = mask & (STRIDE * column >= dilation)
    right = mask & (STRIDE * column + dilation < W)
    tap = dilation * C
    x_offset = STRIDE * column * C + channel
    y_offset = column * C + channel
    # From the last row of a chain the walk goes back to the row before the next one.
    last_row = (length - 1) * step
    back = -1 - length * step
    x_step = (STRIDE * step * W).to(tl.int64) * C
    x_back = (STRIDE * back * W).to(tl.int64) * C
    y_step = (step * WO).to(tl.int64) * C
    y_back = (back * WO).to(tl.int64) * C
    row = row_of(first, step, phases, length)
    x += (STRIDE * row * W).to(tl.int64) * C
    y += (row * WO).to(tl.int64) * C
    w_top = _load_window_rows(w + channel, 0, w_edge, channel < C, C, EDGES, ACC)
    w_centre = _load_window_rows(w + channel, 1, w_edge, channel < C, C, EDGES, ACC)
    w_bottom = _load_window_rows(w + channel, 2, w_edge, channel < C, C, EDGES, ACC)
    nothing = _repeat(0.0, EDGES)
    zeros = _repeat(tl.zeros((column.shape[0], channel.shape[1]), dtype=ACC), EDGES)
    if HOP == 1:
        # Row of entry e: the bottom row of output e - 1, the centre row of e, the top row of e + 1.
        one_row, two_rows = zeros, zeros
        before = HO  # no row: the output before the first is another program's
        for done in range(-2, rows, AT_ONCE):
            taps, outputs, masks = (), (), ()
            for k in tl.static_range(AT_ONCE):
                here = within(STRIDE * row, H)
                taps = taps + (
                    load_taps(
                        x + x_offset, tap, here & left, here & mask, here & right, norm,
                        RELU, NORM, ACC,
                    ),
                )  # fmt: skip
                outputs = outputs + (y + y_offset,)
                masks = masks + (mask & within(before, HO) & within(done + k, count),)
                over = row >= last_row
                on = tl.where(before >= last_row, y_back, y_step)
                y += on if k > 0 else tl.where(done > -2, on, 0)
                x += tl.where(over, x_back, x_step)
                before = row
                row += tl.where(over, back, step)
            for k in tl.static_range(AT_ONCE):
                three_rows = _window_rows(w_bottom, taps[k], two_rows, EDGES)
                two_rows = _window_rows(w_centre, taps[k], one_row, EDGES)
                one_row = _window_rows(w_top, taps[k], nothing, EDGES)
                _store_row(outputs[k], y_edge, three_rows, masks[k], EDGES)
    else:
        # Row of entry e: the centre row of output e. Below: its bottom row, the top row of e + 1.
        x_below = (dilation * W).to(tl.int64) * C
        one_row = zeros
        for done in range(-1, rows, AT_ONCE):
            centres, bottoms, outputs, masks = (), (), (), ()
            for k in tl.static_range(AT_ONCE):
                here = within(STRIDE * row, H)
                below = within(STRIDE * row + dilation, H)
                at = x + x_offset
                centres = centres + (
                    load_taps(
                        at, tap, here & left, here & mask, here & right, norm, RELU, NORM, ACC
                    ),
                )
                at += x_below
                bottoms = bottoms + (
                    load_taps(
                        at, tap, below & left, below & mask, below & right, norm, RELU, NORM, ACC
                    ),
                )
                outputs = outputs + (y + y_offset,)
                masks = masks + (mask & within(row, HO) & within(done + k, count),)
                over = row >= last_row
                x += tl.where(over, x_back, x_step)
                y += tl.where(over, y_back, y_step)
                row += tl.where(over, back, step)
            for k in tl.static_range(AT_ONCE):
                two_rows = _window_rows(w_centre, centres[k], one_row, EDGES)
                three_rows = _window_rows(w_bottom, bottoms[k], two_rows, EDGES)
                one_row = _window_rows(w_top, bottoms[k], nothing, EDGES)
                _store_row(outputs[k], y_edge, three_rows, masks[k], EDGES)


@kernel(do_not_specialize=["packed_dilations", "N", "branches", "segments"])
def _forward_kernel(
    x_ptr, w_ptr, y_ptr, packed_dilations, N, H, W, HO, WO, C, branches, segments,
    STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    EDGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a segment of a branch's sequence, BLOCK_P columns, BLOCK_C channels.

    Branches are neighbours in launch order, so that they find x in the L2 cache.
    """
    wait_for_predecessor()
    branch = tl.program_id(0) % branches
    rest = tl.program_id(0) // branches
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (rest % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rest = rest // channel_blocks
    column_blocks = tl.cdiv(WO, BLOCK_P)
    column = (rest % column_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    rest = rest // column_blocks
    image = (rest // segments).to(tl.int64)

    dilation = dilation_of(packed_dilations, branch)
    _, phases, length = chains_of(dilation, HO, STRIDE)
    rows = tl.cdiv(phases * (length + 1) - 1, segments)
    first = rest % segments * rows
    x = x_ptr + image * H * W * C
    w = w_ptr + branch * 9 * C
    y = y_ptr + (branch.to(tl.int64) * N + image) * HO * WO * C
    w_edge = branches * 9 * C
    y_edge = branches.to(tl.int64) * N * HO * WO * C
    if STRIDE == 1 or dilation % STRIDE == 0:
        _walk(
            x, (0.0, 0.0), w, y, column, channel, first, rows, dilation, w_edge, y_edge, H, W, HO,
            WO, C, STRIDE, 1, EDGES, RELU, False, ACC,
        )  # fmt: skip
    else:
        _walk(
            x, (0.0, 0.0), w, y, column, channel, first, rows, dilation, w_edge, y_edge, H, W, HO,
            WO, C, STRIDE, 2, EDGES, RELU, False, ACC,
        )  # fmt: skip


def depthwise_multi(
    x: Tensor,
    weights: Tensor,
    dilations: Sequence[int],
    stride: int = 1,
    relu: bool = False,
    config: ForwardConfig | None = None,
) -> Tensor:
    """Depthwise convolutions of x: (edges, branches, N, C, ceil(H / stride), ceil(W / stride)).

    x: (N, C, H, W), channels_last; weights: (edges, branches, 3, 3, C), contiguous, any float
    dtype; dilations: one a branch, 1 to 255. Every y[e, b] is a dense channels_last map of x's
    dtype. Raises `ValueError` naming the argument at fault.
    """
    edges, branches, channels = check_arguments(x, weights, dilations, stride)
    images, _, height, width = x.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    y = empty_map((edges, branches, images, channels, out_height, out_width), x)
    config = config or ForwardConfig.default(tuple(y.shape), dilations, stride)
    segments = triton.cdiv(out_height, config.rows)
    tiles = triton.cdiv(out_width, config.block_p) * triton.cdiv(channels, config.block_c)
    _forward_kernel[(images * segments * tiles * branches,)](
        x, weights, y, pack(dilations), images, height, width, out_height, out_width,
        channels, branches, segments,
        STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype),
        EDGES=edges, BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
    )  # fmt: skip
    return y


def depthwise(
    x: Tensor, weight: Tensor, dilation: int = 1, stride: int = 1, relu: bool = False
) -> Tensor:
    """One branch: (N, C, H, W), weight (3, 3, C) -> (N, C, ceil(H / stride), ceil(W / stride))."""
    return depthwise_multi(x, weight[None, None], (dilation,), stride, relu)[0, 0]


def _step(dilation: int, stride: int) -> int:
    """Distance of the output rows that share input rows."""
    return dilation // stride if dilation % stride == 0 else dilation
