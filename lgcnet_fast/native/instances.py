"""Every kernel instantiation that exists, by name.

One list serves all: the extension's build, the run-time compiler, the compile check and the
launchers, which pick from it. The build reads this file on its own, so it imports nothing but the
standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

NAMESPACE = "lgcnet"
BYTES = {"float": 4, "Half": 2, "BFloat16": 2}
"""Storage types of csrc/numeric.cuh and their sizes in bytes."""


@dataclass(frozen=True)
class Instance:
    """One instantiation of a kernel template of `csrc/<source>`."""

    source: str
    kernel: str
    parameters: tuple[str, ...]

    @property
    def expression(self) -> str:
        """As C++ writes it, e.g. `lgcnet::sum_partials<16>`."""
        return f"{NAMESPACE}::{self.kernel}<{','.join(self.parameters)}>"

    @property
    def hopper(self) -> bool:
        """Whether it does its work on GPUs of sm_90 only (csrc/hopper.cuh)."""
        return self.kernel in ("depthwise_branches_backward", "conv3_weight_gradient")


def depthwise_forward(storage: str, vector: int, stride: int, columns: int, rows: int) -> Instance:
    """`vector` channels a thread; it walks over `rows` x `columns` outputs."""
    return _instance("depthwise.cuh", "depthwise_forward", storage, vector, stride, columns, rows)


def depthwise_backward(storage: str, vector: int, columns: int, rows: int) -> Instance:
    return _instance("depthwise.cuh", "depthwise_backward", storage, vector, columns, rows)


def depthwise_backward_stride2(storage: str, vector: int) -> Instance:
    return _instance("depthwise.cuh", "depthwise_backward_stride2", storage, vector)


def depthwise_branches_backward(storage: str, tiles: int) -> Instance:
    """`tiles` of 8 x 8 positions for each warpgroup."""
    return _instance("depthwise_branches.cuh", "depthwise_branches_backward", storage, tiles)


def conv3_weight_gradient(storage: str, out_block: int) -> Instance:
    """`out_block` channels of dy for a block."""
    return _instance("conv3_weight_gradient.cuh", "conv3_weight_gradient", storage, out_block)


def conv3(outputs: int, across: int) -> Instance:
    """`outputs` channels a thread; `across`: warps of a block beside each other."""
    return _instance("conv3.cuh", "conv3", outputs, across)


def conv3_weight_sums(tile: int) -> Instance:
    """`tile` channels of x and of dy for a block."""
    return _instance("conv3_weight_sums.cuh", "conv3_weight_sums", tile)


def gradient_sum(storage: str, vector: int) -> Instance:
    """`vector` numbers that a thread reads at once."""
    return _instance("gradient_sum.cuh", "gradient_sum", storage, vector)


def sum_partials() -> Instance:
    return _instance("sums.cuh", "sum_partials", SUM_LANES)


def upsample_forward(storage: str, vector: int) -> Instance:
    return _instance("upsample.cuh", "upsample_forward", storage, vector)


def upsample_backward(storage: str, vector: int) -> Instance:
    return _instance("upsample.cuh", "upsample_backward", storage, vector)


def upsample_backward_axis(source: str, target: str, vector: int) -> Instance:
    return _instance("upsample.cuh", "upsample_backward_axis", source, target, vector)


def max_pool_forward(storage: str, vector: int, stride: int) -> Instance:
    return _instance("max_pool.cuh", "max_pool_forward", storage, vector, stride)


def max_pool_backward(storage: str, vector: int, stride: int) -> Instance:
    kernel = "max_pool_backward" if stride == 1 else "max_pool_backward_stride2"
    return _instance("max_pool.cuh", kernel, storage, vector)


def tile_statistics(storage: str, vector: int) -> Instance:
    return _instance("batch_statistics.cuh", "tile_statistics", storage, vector)


def merge_statistics() -> Instance:
    return _instance("batch_statistics.cuh", "merge_statistics", MERGE_LANES)


def mixed_sum(storage: str, vector: int) -> Instance:
    return _instance("mixed_sum.cuh", "mixed_sum", storage, vector)


def gradient_sums(storage: str, vector: int) -> Instance:
    return _instance("mixed_sum.cuh", "gradient_sums", storage, vector)


def mixed_sum_gradients(storage: str, vector: int) -> Instance:
    return _instance("mixed_sum.cuh", "mixed_sum_gradients", storage, vector)


def upsample_argmax(storage: str) -> Instance:
    return _instance("upsample_cells.cuh", "upsample_argmax", storage)


def upsample_losses(storage: str) -> Instance:
    return _instance("upsample_loss.cuh", "upsample_losses", storage)


def upsample_loss_sums(storage: str) -> Instance:
    return _instance("upsample_loss.cuh", "upsample_loss_sums", storage)


def upsample_loss_mean() -> Instance:
    return _instance("upsample_loss.cuh", "upsample_loss_mean", MEAN_THREADS)


def logits_gradient(storage: str) -> Instance:
    return _instance("upsample_loss.cuh", "logits_gradient", storage)


def count_digits() -> Instance:
    return _instance("order_statistic.cuh", "count_digits", COUNT_THREADS)


def select_digit() -> Instance:
    return _instance("order_statistic.cuh", "select_digit", DIGITS)


def separable(storage: str, vector: int, stride: int, taps: int, width: int) -> Instance:
    """`taps`: 9, or 1 without a window; `width` outputs a block."""
    return _instance("separable.cuh", "separable", storage, vector, stride, taps, width)


def concat_product(vector: int, width: int) -> Instance:
    """`vector` numbers that a thread reads at once; `width` columns a block, as the next two."""
    return _instance("concat_product.cuh", "concat_product", vector, width)


def concat_product_gradients(vector: int, width: int) -> Instance:
    return _instance("concat_product.cuh", "concat_product_gradients", vector, width)


def concat_product_weight_gradients(vector: int, width: int) -> Instance:
    return _instance("concat_product.cuh", "concat_product_weight_gradients", vector, width)


BRANCH_TILES = (1, 2, 4)
"""What `depthwise_branches_backward` has for strips of up to 16 rows."""

OUT_BLOCKS = (64, 48, 32)
"""Channels of dy that a block of `conv3_weight_gradient` has."""

SUMS_TILES = (64, 32, 48)
"""Channels of both maps that a block of `conv3_weight_sums` has, the best first."""

CONV3_TILES = ((8, 2), (8, 1), (12, 1))
"""Channels a thread of `conv3`, and warps beside each other, that have four times as many each."""

SUM_LANES = 16
"""Threads that share one sum of `sum_partials`."""

MERGE_LANES = 32
"""Threads that merge the tiles of one channel's statistics."""

MEAN_THREADS = 256
COUNT_THREADS = 64
DIGITS = 256
"""Threads of the one block of `upsample_loss_mean`, of `count_digits` and of `select_digit`."""


CONCAT_TILES = ((4, 48), (4, 64), (1, 32))
"""Numbers that a thread reads at once and columns a block of the products of concatenations."""


BACKWARD_WALKS = ((4, 1, 4), (2, 1, 4), (2, 2, 4), (2, 2, 8), (2, 4, 4))
"""Channels a thread, columns and rows of its walk: what the tuning may choose from."""


def vectors(storage: str) -> tuple[int, ...]:
    """Channels a thread may own, widest first: 16 or 8 bytes, or a single channel."""
    return (16 // BYTES[storage], 8 // BYTES[storage], 1)


@cache
def all_instances() -> dict[Instance, None]:
    """Everything that a launcher can ask for, as an ordered set."""
    found = [sum_partials(), merge_statistics()]
    found += [upsample_loss_mean(), count_digits(), select_digit()]
    found += [conv3(*tile) for tile in CONV3_TILES]
    found += [conv3_weight_sums(tile) for tile in SUMS_TILES]
    for vector, width in CONCAT_TILES:
        found += [concat_product(vector, width), concat_product_gradients(vector, width)]
        found.append(concat_product_weight_gradients(vector, width))
    for storage in BYTES:
        wide, narrow, single = vectors(storage)
        for vector, columns in product((wide, narrow), (1, 2)):
            found += [
                depthwise_forward(storage, vector, 1, columns, 4),
                depthwise_forward(storage, vector, 1, columns, 8),
                depthwise_forward(storage, vector, 2, columns, 4),
            ]
        for vector, columns, rows in BACKWARD_WALKS:
            found.append(depthwise_backward(storage, vector, columns, rows))
        found += [depthwise_backward_stride2(storage, vector) for vector in (4, 2, single)]
        found += [depthwise_forward(storage, single, stride, 2, 4) for stride in (1, 2)]
        found.append(depthwise_backward(storage, single, 2, 4))
        for vector in (wide, single):
            found += [upsample_forward(storage, vector), upsample_backward(storage, vector)]
            found += [tile_statistics(storage, vector), mixed_sum(storage, vector)]
            found.append(gradient_sum(storage, vector))
            found += [gradient_sums(storage, vector), mixed_sum_gradients(storage, vector)]
            found += [max_pool_forward(storage, vector, stride) for stride in (1, 2)]
        for vector in (4, 2, single):
            found += [max_pool_backward(storage, vector, stride) for stride in (1, 2)]
        for vector in (4, single):
            found.append(upsample_backward_axis(storage, "float", vector))
            found.append(upsample_backward_axis("float", storage, vector))
        for (stride, taps), width in product(((1, 9), (2, 9), (1, 1)), (64, 32)):
            found.append(separable(storage, 4, stride, taps, width))
            if width == 32:
                found.append(separable(storage, single, stride, taps, width))
        if storage != "float":
            found += [depthwise_branches_backward(storage, tiles) for tiles in BRANCH_TILES]
            found += [conv3_weight_gradient(storage, block) for block in OUT_BLOCKS]
        found += [upsample_argmax(storage), upsample_losses(storage)]
        found += [upsample_loss_sums(storage), logits_gradient(storage)]
    return dict.fromkeys(found)


def _instance(source: str, kernel: str, *parameters: str | int) -> Instance:
    return Instance(source, kernel, tuple(_qualified(parameter) for parameter in parameters))


def _qualified(parameter: str | int) -> str:
    named = parameter in BYTES and parameter != "float"
    return f"{NAMESPACE}::{parameter}" if named else str(parameter)
