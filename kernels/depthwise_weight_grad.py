"""Weight gradient of the depthwise branches, in two stages and hence in a fixed order.

    dw[e, b, u, v, c] = sum_{n, i, j} r(x[n, s i + u d_b, s j + v d_b, c]) dy[e, b, n, i, j, c]

The programs walk the same sequence of rows as the forward kernel: the three horizontal taps of an
input row, loaded once, meet the dy of the up to three outputs that they served, and a dy stays in
registers from one row to the next. A row is loaded AT_ONCE rows before it is used. A program adds
up several walks before it writes its share of dw; `sum_rows` adds the shares. Each map of dy has
its own programs, since nine sums a channel are all that the registers hold; the maps are neighbours
in launch order, so that they find x in the L2 cache.

Least traffic, in maps of y: s^2 + E B. Arithmetic: 9 E B multiply-adds an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgcnet_fast.kernels.common import accumulator, accumulator_dtype, sum_rows
from lgcnet_fast.kernels.depthwise import (
    AT_ONCE,
    chains_of,
    default_block,
    default_rows,
    dilation_of,
    ready,
    rectify,
    row_of,
    share_rows,
    within,
)
from lgcnet_fast.kernels.depthwise_arguments import Maps, check_arguments, check_dy, pack
from lgcnet_fast.kernels.launches import (
    INTERPRETED,
    cuda_capability_geq,
    kernel,
    wait_for_predecessor,
)
from lgcnet_fast.kernels.slabs import pointer_of

_INTERPRETED = tl.constexpr(INTERPRETED)

MOST_REGISTERS = 128
"""Of a thread that adds up four elements, so that 16 warps share a core: what is on its way needs
them, and left alone the compiler takes 152."""


@dataclass(frozen=True)
class WeightGradConfig:
    """Tile: walks of about `rows` outputs of `block_p` columns and `block_c` channels.

    `programs` of them to a map of dy; `depthwise_backward` takes the rows of a walk exactly.
    """

    rows: int
    block_p: int
    block_c: int
    warps: int
    programs: int

    @classmethod
    def default(
        cls, dy_shape: tuple[int, ...], dilations: Sequence[int], stride: int
    ) -> WeightGradConfig:
        """8 bytes of 16-bit storage a thread and load; up to 4 programs for each of 132 cores.

        Walks are long and as many as programs, or a multiple. Those of a single map are short, for
        `depthwise_backward`, whose threads hold twice as much. Tiles are narrow, since those of few
        columns take longer to add up at the end.
        """
        edges, branches, images, channels, height, width = dy_shape
        if edges * branches == 1:
            block_p, block_c = default_block(width, channels, widest=32, elements=256)
            warps = 2
        else:
            block_p, block_c = default_block(width, channels, widest=16)
            warps = 4
        most = max(1, 528 // (edges * branches * triton.cdiv(channels, block_c)))
        walks = images * triton.cdiv(width, block_p)
        if edges * branches == 1:
            rows = default_rows(height, dilations, stride)
            if dilations[0] % stride:  # four values of x an output, not one
                rows = min(4, rows)
        else:
            rows = share_rows(height, most // walks)
        walks *= triton.cdiv(height, rows)
        programs = triton.cdiv(walks, triton.cdiv(walks, most))
        return cls(rows, block_p, block_c, warps, programs)


@triton.jit
def add_products(total, taps, g):
    return total[0] + taps[0] * g, total[1] + taps[1] * g, total[2] + taps[2] * g


@triton.jit
def _parts(x, RELU: tl.constexpr, ACC: tl.constexpr):
    """What was loaded as numbers to multiply: (even, odd channels) of words, else (all of them,).

    A word holds two bfloat16, which are the upper halves of float32.
    """
    if x.dtype == tl.int32:
        PACKED: tl.constexpr = RELU and not _INTERPRETED and cuda_capability_geq(8, 0)
        if PACKED:
            x = tl.inline_asm_elementwise(
                "mov.b32 $0, 0; max.NaN.bf16x2 $0, $1, $0;", "=&r,r", [x],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        even = (x << 16).to(tl.float32, bitcast=True).to(ACC)
        odd = (x & -65536).to(tl.float32, bitcast=True).to(ACC)
        return rectify(even, RELU and not PACKED), rectify(odd, RELU and not PACKED)
    else:
        return (ready(x, RELU, ACC),)


@triton.jit
def _add_parts(totals, taps, g, PARTS: tl.constexpr):
    """A window row of dw, (left, middle, right) for each part, with an entry added."""
    sums = ()
    for part in tl.static_range(PARTS):
        for tap in tl.static_range(3):
            sums = sums + (totals[3 * part + tap] + taps[tap][part] * g[part],)
    return sums


@triton.jit
def _load_entry(
    x, dy, offset, x_offset, tap, left, mask, right, row, after, counted, H, HO,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """The three taps of an input row and the dy of the row after it, as stored."""
    here = within(STRIDE * row, H) & counted
    there = within(after, HO) & counted
    at = x + x_offset
    return (
        tl.load(at - tap, mask=here & left, other=0),
        tl.load(at, mask=here & mask, other=0),
        tl.load(at + tap, mask=here & right, other=0),
        tl.load(dy + offset, mask=there & mask, other=0),
    )


@triton.jit
def _walk(
    top, centre, bottom, x, dy, column, channel, first, rows, count, dilation, H, W, HO, WO, C,
    STRIDE: tl.constexpr, HOP: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The three window rows of dw, each (left, middle, right) of each part, with a walk added.

    Adds the products of the input rows of `count` (up to `rows`) entries: with HOP = 1 those after
    entry `first`, with HOP = 2 those from it on. x and dy point at the image. C counts what x
    points at: channels, or words.
    """
    step, phases, length = chains_of(dilation, HO, STRIDE)
    mask = (column < WO) & (channel < C)
    left = mask & (STRIDE * column >= dilation)
    right = mask & (STRIDE * column + dilation < W)
    tap = dilation * C
    x_offset = STRIDE * column * C + channel
    offset = column * C + channel
    # From the last row of a chain the walk goes back to the row before the next one.
    last_row = (length - 1) * step
    back = -1 - length * step
    x_step = (STRIDE * step * W).to(tl.int64) * C
    x_back = (STRIDE * back * W).to(tl.int64) * C
    y_step = (step * WO).to(tl.int64) * C
    y_back = (back * WO).to(tl.int64) * C
    row = row_of(first, step, phases, length)
    x += (STRIDE * row * W).to(tl.int64) * C
    dy += (row * WO).to(tl.int64) * C
    after = row + tl.where(row >= last_row, back, step)
    # Output of entry e is g; the one before it g_before and the one after it g_after.
    g = _parts(tl.load(dy + offset, mask=mask & within(row, HO), other=0), False, ACC)
    dy += tl.where(row >= last_row, y_back, y_step)
    if HOP == 1:
        x += tl.where(row >= last_row, x_back, x_step)
        row = after
        g_before = g
        g = _parts(tl.load(dy + offset, mask=mask & within(row, HO), other=0), False, ACC)
        dy += tl.where(row >= last_row, y_back, y_step)
        after = row + tl.where(row >= last_row, back, step)
        # Entries on their way: one is loaded whenever one is used.
        coming = ()
        for k in tl.static_range(AT_ONCE):
            coming = coming + (
                _load_entry(
                    x, dy, offset, x_offset, tap, left, mask, right, row, after, k < count, H, HO,
                    STRIDE,
                ),
            )  # fmt: skip
            x += tl.where(row >= last_row, x_back, x_step)
            row = after
            dy += tl.where(after >= last_row, y_back, y_step)
            after += tl.where(after >= last_row, back, step)
        for done in range(0, rows, AT_ONCE):
            for k in tl.static_range(AT_ONCE):
                entry = coming[0]
                taps = (
                    _parts(entry[0], RELU, ACC),
                    _parts(entry[1], RELU, ACC),
                    _parts(entry[2], RELU, ACC),
                )
                g_after = _parts(entry[3], False, ACC)
                coming = (
                    coming[1],
                    coming[2],
                    _load_entry(
                        x, dy, offset, x_offset, tap, left, mask, right, row, after,
                        done + (k + AT_ONCE) < count, H, HO, STRIDE,
                    ),
                )  # fmt: skip
                x += tl.where(row >= last_row, x_back, x_step)
                row = after
                dy += tl.where(after >= last_row, y_back, y_step)
                after += tl.where(after >= last_row, back, step)
                bottom = _add_parts(bottom, taps, g_before, PARTS)
                centre = _add_parts(centre, taps, g, PARTS)
                top = _add_parts(top, taps, g_after, PARTS)
                g_before, g = g, g_after
    else:
        x_below = (dilation * W).to(tl.int64) * C
        for done in range(0, rows):
            counted = done < count
            here = _load_entry(
                x, dy, offset, x_offset, tap, left, mask, right, row, after, counted, H, HO, STRIDE
            )
            below = within(STRIDE * row + dilation, H) & counted
            at = x + x_below + x_offset
            taps_below = (
                _parts(tl.load(at - tap, mask=below & left, other=0), RELU, ACC),
                _parts(tl.load(at, mask=below & mask, other=0), RELU, ACC),
                _parts(tl.load(at + tap, mask=below & right, other=0), RELU, ACC),
            )
            taps = (
                _parts(here[0], RELU, ACC),
                _parts(here[1], RELU, ACC),
                _parts(here[2], RELU, ACC),
            )
            g_after = _parts(here[3], False, ACC)
            centre = _add_parts(centre, taps, g, PARTS)
            bottom = _add_parts(bottom, taps_below, g, PARTS)
            top = _add_parts(top, taps_below, g_after, PARTS)
            g = g_after
            x += tl.where(row >= last_row, x_back, x_step)
            row = after
            dy += tl.where(after >= last_row, y_back, y_step)
            after += tl.where(after >= last_row, back, step)
    return top, centre, bottom


@triton.jit
def _add_walks(
    x_ptr, dy_ptr, channel, program, programs, segments, dilation, N, H, W, HO, WO, C,
    STRIDE: tl.constexpr, HOP: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The three window rows of dw, summed over every `programs`-th walk."""
    nothing = ()
    for _ in tl.static_range(3 * PARTS):
        nothing = nothing + (tl.zeros((BLOCK_P, channel.shape[1]), dtype=ACC),)
    top, centre, bottom = nothing, nothing, nothing
    _, phases, length = chains_of(dilation, HO, STRIDE)
    entries = phases * (length + 1) + (HOP - 2)
    rows = tl.cdiv(entries, segments)
    column_blocks = tl.cdiv(WO, BLOCK_P)
    for walk in range(program, N * segments * column_blocks, programs):
        column = walk % column_blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        first = walk // column_blocks % segments * rows
        count = tl.maximum(tl.minimum(rows, entries - first), 0)
        image = (walk // column_blocks // segments).to(tl.int64)
        top, centre, bottom = _walk(
            top, centre, bottom, x_ptr + image * H * W * C, dy_ptr + image * HO * WO * C,
            column, channel, first, rows, count, dilation,
            H, W, HO, WO, C, STRIDE, HOP, RELU, ACC, PARTS,
        )  # fmt: skip
    return top, centre, bottom


@triton.jit
def _add_nine(
    a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8
):  # fmt: skip
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8


@triton.jit
def _store_share(share, top, centre, bottom, channel_mask, C):
    """Sums the nine of dw over the columns of the tile, all at once, and writes them."""
    if _INTERPRETED:  # where reductions of several values take long
        store_window_row(share, top, channel_mask, C, 0)
        store_window_row(share, centre, channel_mask, C, 1)
        store_window_row(share, bottom, channel_mask, C, 2)
    else:
        sums = tl.reduce(top + centre + bottom, 0, _add_nine)
        for tap in tl.static_range(9):
            tl.store(share + tap * C, sums[tap][None, :], mask=channel_mask)


@triton.jit
def store_window_row(share, row, channel_mask, C, WINDOW_ROW: tl.constexpr):
    """Sums a window row of dw over the positions of the tile and writes it."""
    for tap in tl.static_range(3):
        total = tl.sum(row[tap], axis=0)[None, :]
        tl.store(share + (3 * WINDOW_ROW + tap) * C, total, mask=channel_mask)


@triton.jit
def _paired(row):
    """A window row of which each element is (even channel, odd channel)."""
    return tl.join(row[0], row[3]), tl.join(row[1], row[4]), tl.join(row[2], row[5])


@kernel(do_not_specialize=["packed_dilations", "N", "maps", "branches", "programs", "segments"])
def _weight_grad_kernel(
    dy_ptrs, x_ptr, share_ptr, packed_dilations, N, H, W, HO, WO, C, maps, branches, programs,
    segments,
    APART: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: every `programs`-th walk of one map of dy, BLOCK_C channels.

    There is a walk for every image, tile of columns and segment of the sequence of rows. With
    PARTS = 2 bfloat16 maps of an even number of channels are read as words of two. APART as in
    `_input_grad_kernel`.
    """
    wait_for_predecessor()
    k = tl.program_id(0) % maps
    dy_ptr = pointer_of(dy_ptrs, k, APART)
    if PARTS == 2:
        x_ptr = x_ptr.to(tl.pointer_type(tl.int32))
        dy_ptr = dy_ptr.to(tl.pointer_type(tl.int32))
    count = C // PARTS
    rest = tl.program_id(0) // maps
    channel_blocks = tl.cdiv(C, BLOCK_C)
    tile: tl.constexpr = BLOCK_C // PARTS
    channel = (rest % channel_blocks) * tile + tl.arange(0, tile)[None, :]
    program = rest // channel_blocks

    dilation = dilation_of(packed_dilations, k % branches)
    if APART == 1:
        dy_ptr += k.to(tl.int64) * N * HO * WO * count
    if STRIDE == 1 or dilation % STRIDE == 0:
        top, centre, bottom = _add_walks(
            x_ptr, dy_ptr, channel, program, programs, segments, dilation, N, H, W, HO, WO, count,
            STRIDE, 1, RELU, ACC, BLOCK_P, PARTS,
        )  # fmt: skip
    else:
        top, centre, bottom = _add_walks(
            x_ptr, dy_ptr, channel, program, programs, segments, dilation, N, H, W, HO, WO, count,
            STRIDE, 2, RELU, ACC, BLOCK_P, PARTS,
        )  # fmt: skip
    share = share_ptr + (program * maps + k).to(tl.int64) * 9 * C
    mask = channel < count
    if PARTS == 2:
        share += 2 * channel[:, :, None] + tl.arange(0, 2)[None, None, :]
        top, centre, bottom = _paired(top), _paired(centre), _paired(bottom)
        _store_share(share, top, centre, bottom, mask[:, :, None], C)
    else:
        _store_share(share + channel, top, centre, bottom, mask, C)


def depthwise_multi_weight_grad(
    dy: Maps,
    x: Tensor,
    weights: Tensor,
    dilations: Sequence[int],
    stride: int = 1,
    relu: bool = False,
    config: WeightGradConfig | None = None,
) -> Tensor:
    """dw of `depthwise_multi`: (edges, branches, 3, 3, C) in the accumulator's dtype.

    dy: as in `depthwise_multi_input_grad`; of `weights` only the shape counts; the others as in
    `depthwise_multi`. Raises `ValueError` naming the argument at fault.
    """
    edges, branches, channels = check_arguments(x, weights, dilations, stride)
    images, _, height, width = x.shape
    dys, (out_height, out_width) = check_dy(dy, x, weights, stride)
    shape = (edges, branches, *dys[0].shape[-4:])
    config = config or WeightGradConfig.default(shape, dilations, stride)
    shares = x.new_empty(config.programs, *weights.shape, dtype=accumulator_dtype(x.dtype))
    words = x.dtype == torch.bfloat16 and channels % 2 == 0 and config.block_c > 1
    few = words and config.block_p * config.block_c <= 128 * config.warps
    blocks = config.programs * triton.cdiv(channels, config.block_c) * edges * branches
    _weight_grad_kernel[(blocks,)](
        dys, x, shares, pack(dilations), images, height, width, out_height, out_width, channels,
        edges * branches, branches, config.programs, triton.cdiv(out_height, config.rows),
        APART=len(dys), STRIDE=stride, RELU=relu, ACC=accumulator(x.dtype), PARTS=2 if words else 1,
        BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.warps,
        maxnreg=MOST_REGISTERS if few else None,
    )  # fmt: skip
    return sum_rows(shares)


def depthwise_weight_grad(
    dy: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, stride: int = 1, relu: bool = False
) -> Tensor:
    """One branch: dy as the output of `depthwise`; dw (3, 3, C) in the accumulator's dtype."""
    return depthwise_multi_weight_grad(
        dy[None, None], x, weight[None, None], (dilation,), stride, relu
    )[0, 0]
