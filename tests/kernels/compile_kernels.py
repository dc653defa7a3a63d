"""Compiles the kernels of training for one architecture, without a GPU.

    python -m tests.kernels.compile_kernels 90 bf16

Prints a JSON line a kernel: registers, bytes of stack (spills) and of shared memory, atomic
operations, and what overwrites registers that products in flight still read. Needs an interpreter
in which Triton compiles, so not one with TRITON_INTERPRET set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from lgcnet_fast.kernels import (
    average_pool,
    common,
    concat_pair,
    concat_pointwise,
    concat_pointwise_backward,
    concat_upsample,
    concat_upsample_backward,
    conv3,
    conv3_backward,
    conv3_stride2,
    conv3_stride2_backward,
    conv3_walk,
    covariance,
    depthwise,
    depthwise_backward,
    depthwise_backward_stride2,
    depthwise_input_grad,
    depthwise_weight_grad,
    gradient_sum,
    image_convolution,
    interleaved,
    max_pool,
    mixed_sum,
    mixed_sum_backward,
    normalised_depthwise,
    pointwise_backward,
    product_algebra,
    product_gradients,
    product_sum,
    weight_stacks,
)
from tests.kernels.registers_in_flight import overwritten
from tests.kernels.stand_in import StandIn

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BRANCHES, PLAIN, READERS = 18, 3, 8
MAPS = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "g_ptr", "out_ptr", "matrices_out_ptr"}
MAPS |= {"e_ptr", "even_ptr", "odd_ptr", "mask_ptr", "matrix_ptr", "weighted_ptr"}
MAPS |= {"from_gradient_ptr", "from_map_ptr", "taps_ptr"}
MAPS |= {f"{name}{index}_ptr" for name in ("x", "y", "dx") for index in range(4)}
LISTS = {
    "y_ptrs": BRANCHES,
    "dy_ptrs": BRANCHES,
    "x_ptrs": PLAIN,
    "dx_ptrs": PLAIN,
    "d_ptrs": BRANCHES,
    "dd_ptrs": BRANCHES,
    "map_ptrs": BRANCHES + PLAIN,
    "w_ptrs": PLAIN,
    "g_ptrs": READERS,
    "other_ptrs": READERS - 1,
}
WEIGHTS = {"z_ptrs", "beta_ptrs"}
"""Lists of float32: one of all weights, or where AFFINE one of each branch."""
NODE = {"K": 3, "J": 1, "ACC": tl.float32}
"""Of a derived network: as many maps as edges end in a node at most, a plain one more."""
OPERANDS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALARS = {"packed_dilations": "i64"}
POINTERS = {"winner_ptr": "u8", "pieces_ptr": "i32", "windows_ptr": "i32", "table_ptr": "i64"}
POINTERS |= {"counter_ptr": "i32"}
MULTIPLES_OF_16 = {"H", "W", "HO", "WO", "C", "CO", "c0", "c1", "c2", "c3"}
MULTIPLES_OF_16 |= {"p0", "p1", "p2", "p3"}
MULTIPLES_OF_16 |= {"columns", "tile_size", "size"}
SHOWN = ("STRIDE", "EDGES", "COPIED", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "BLOCK_O")
DIVISIBLE = [["tt.divisibility", 16]]


def kernels() -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Kernel, compile-time arguments and warps: the defaults for 64 channels and large maps."""
    for stride in (1, 2):
        shared = {"STRIDE": stride, "RELU": True, "ACC": tl.float32}
        tile = {"BLOCK_P": 8, "BLOCK_C": 64}
        for edges in (1, 2):
            yield depthwise._forward_kernel, shared | tile | {"EDGES": edges}, 4
        for apart in (1, BRANCHES):
            sums = shared | {"APART": apart, "BLOCK_P": 32, "BLOCK_C": 16}
            for parts in (1, 2):
                yield depthwise_weight_grad._weight_grad_kernel, sums | {"PARTS": parts}, 4
        yield depthwise_backward._backward_kernel, shared | tile | {"ROWS": 8}, 4
        for rows in (2, 4, 8) if stride == 1 else (2,):
            tile = {"BLOCK_P": 32, "BLOCK_C": 16, "ROWS": rows}
            for apart, others in ((1, 0), (BRANCHES, READERS - 1)):
                options = shared | tile | {"APART": apart, "OTHERS": others}
                yield depthwise_input_grad._input_grad_kernel, options, 2 if rows == 8 else 4
    second = {"EDGES": 2, "ACC": tl.float32}
    for elements, warps in ((256, 2), (512, 4)):
        tile = second | {"BLOCK_P": elements // 64, "BLOCK_C": 64}
        yield normalised_depthwise._normalised_forward_kernel, tile, warps
    tile = second | {"ROWS": 8, "BLOCK_P": 8, "BLOCK_C": 32}
    yield normalised_depthwise._normalised_backward_kernel, tile, 2
    tile = second | {"LOADS": 4, "GROUPS": 128, "VECTOR": 8}
    yield normalised_depthwise._norm_gradients_kernel, tile, 4
    walk = {"RELU": True, "ACC": tl.float32, "ROWS": 4, "BLOCK_P": 8, "BLOCK_C": 32}
    yield depthwise_backward_stride2._both_gradients_kernel, walk, 2
    counts = {"K": BRANCHES, "J": PLAIN, "ACC": tl.float32}
    streaming = {"AHEAD": 2, "LOADS": 2, "GROUPS": 128, "VECTOR": 8}
    statistics = {"K": BRANCHES, "ACC": tl.float32, "EPS": 1e-5}
    many = {"BLOCK_M": 32, "LOADS": 4, "BLOCK_C": 32}
    few = {"BLOCK_M": 128, "LOADS": 4, "BLOCK_C": 16}
    for whole in (True, False):
        merged = statistics | {"WHOLE": whole}
        yield mixed_sum._slab_statistics_kernel, merged | many | {"BLOCK_S": 64}, 4
        yield mixed_sum._slab_statistics_kernel, merged | few | {"BLOCK_S": 32}, 8
    many = {"BLOCK_M": 16, "LOADS": 4, "BLOCK_C": 64, "BLOCK_S": 32}
    few = {"BLOCK_M": 64, "LOADS": 4, "BLOCK_C": 16, "BLOCK_S": 32}
    for slab in (many, few):
        summed = counts | {"MAPS": 1, "SUMMED": 64}
        yield mixed_sum_backward._gradient_sums_kernel, summed | slab, 4
    several = {"LOADS": 2, "BLOCK_S": 16, "MAPS": 2, "SUMMED": 64}
    yield mixed_sum_backward._gradient_sums_kernel, counts | many | several, 4
    yield mixed_sum._mixed_sum_kernel, counts | streaming | {"AFFINE": False}, 4
    yield mixed_sum._mixed_sum_kernel, NODE | streaming | {"AFFINE": True}, 4
    yield mixed_sum_backward._mixed_sum_grad_kernel, counts | streaming | {"AFFINE": False}, 4
    yield mixed_sum_backward._mixed_sum_grad_kernel, NODE | streaming | {"AFFINE": True}, 4
    yield common._sum_rows_kernel, {"BLOCK_ROWS": 256, "BLOCK_COLUMNS": 8}, 4
    shares = {"WINDOW_ROWS": 256, "WINDOW_COLUMNS": 8, "PRODUCT_ROWS": 16, "PRODUCT_COLUMNS": 128}
    yield common._sum_shares_kernel, shares, 4
    stacks = {"COLUMNS": weight_stacks.COLUMNS, "BLOCK": weight_stacks.BLOCK}
    yield weight_stacks._stacks_kernel, stacks, weight_stacks.WARPS
    readers = {"K": READERS, "RELU": True, "ACC": tl.float32, "BLOCK": gradient_sum.BLOCK}
    yield gradient_sum._gradient_sum_kernel, readers, gradient_sum.WARPS
    for groups, vector in ((128, 8), (1024, 1)):
        pair = {"RELU": True, "ACC": tl.float32, "INDEX": tl.int32}
        pair |= {"GROUPS": groups, "VECTOR": vector}
        yield concat_pair._concat_pair_kernel, pair, concat_pair.WARPS
        yield concat_pair._concat_pair_grad_kernel, pair | {"K": READERS}, concat_pair.WARPS
    strips = {"MAPS": 3, "GROUPS": 128, "VECTOR": 8, "ROWS": 4, "ACC": tl.float32}
    yield concat_upsample._concat_kernel, strips, 4
    for copied in (1, 7):
        yield concat_upsample._sum_kernel, strips | {"COPIED": copied}, 4
    beside = concat_upsample_backward._LOADS_BESIDE_COPIES
    for taps, step in ((1, 1), (3, beside // 3), (4, beside // 4), (9, 1)):
        taken = {"TAPS": taps, "STEP": step, "ROWS": concat_upsample_backward.BACKWARD.rows}
        yield concat_upsample_backward._backward_kernel, strips | taken, 4
    tile = {"ACC": tl.float32, "BLOCK_P": 8, "BLOCK_C": 64, "ROWS": 8}
    for stride in (1, 2):
        for winners in (False, True):
            yield max_pool._max_pool_kernel, tile | {"STRIDE": stride, "WINNERS": winners}, 4
    tile |= {"BLOCK_P": 16, "ROWS": 4}
    for readers in (1, 2):
        read = tile | {"READERS": readers}
        yield max_pool._max_pool_backward_kernel, read, 4
        yield max_pool._max_pool_backward_stride_2_kernel, read, 4
    tile = {"ACC": tl.float32, "BLOCK_P": 128, "BLOCK_C": 16}
    for relu in (False, True):
        rectified = tile | {"BLOCK_P": 256, "RELU": relu}
        yield average_pool._pieces_kernel, rectified, average_pool.WARPS
    yield average_pool._means_kernel, tile | {"BLOCK_P": 16, "BLOCK_C": 64}, average_pool.WARPS
    # To 1, 2 and 5 bins, of which only 5 divide no side.
    spans = {"POOLS": 3, "BINS": 0x050201, "TALL": 0x020101, "WIDE": 0x020101}
    for relu in (False, True):
        rectified = tile | spans | {"ROWS": 4, "RELU": relu}
        yield average_pool._spread_kernel, rectified, average_pool.WARPS


def convolutions_of_images(
    storage: str, arch: int
) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `products`: those of images have tiles for every GPU."""
    matrix_units = arch >= 80 and storage != "fp32"
    shared = {"ACC": tl.float32, "OPERAND": OPERANDS[storage if matrix_units else "fp32"]}
    for channels, out_channels, stride in ((1, 64, 1), (3, 8, 2), (3, 64, 2), (4, 64, 2)):
        config = image_convolution.ImageConfig.default(channels, 256, out_channels, matrix_units)
        tile = {"BLOCK_P": config.block_p, "BLOCK_O": config.block_o, "C": channels}
        tile |= {"STRIDE": stride, "BLOCK_K": image_convolution.block_k(channels)}
        for kernel in (
            image_convolution._image_convolution_kernel,
            image_convolution._image_weight_grad_kernel,
        ):
            yield kernel, shared | tile, config.warps, 1


def products(storage: str, arch: int) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `kernels`, and stages: those with matrix products, which need compute capability 8.0."""
    yield from gradients_of_products(storage, arch)
    yield from products_of_concatenations(storage)
    yield from nodes_of_products(storage, large=arch == 90)


def products_of_concatenations(storage: str) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `products`: with resized maps and without, and the widest."""
    size, smaller, dtype = (64, 128), (32, 64), DTYPES[storage]
    shared = {"ACC": tl.float32, "OPERAND": OPERANDS[storage], "RELU": True, "MAPS": PLAIN}
    for copied, channels in ((1, 48), (7, 48), (7, 128)):
        shapes = [(16, channels, *(size if copied >> i & 1 else smaller)) for i in range(PLAIN)]
        maps = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        resizes = concat_pointwise.resizes(maps, size)
        forward = concat_pointwise.ProductConfig.default(
            [channels] * PLAIN, channels, resizes, dtype
        )
        tile = {"BLOCK_M": forward.block_m, "BLOCK_N": forward.block_n, "BLOCK_K": forward.block_k}
        kernel: Any = concat_pointwise._concat_pointwise_kernel
        yield kernel, shared | tile | {"COPIED": copied}, forward.warps, forward.stages
        backward = concat_pointwise_backward.default_config(maps, channels, size)
        tile = {"BLOCK_M": backward.block_m, "BLOCK_C": backward.block_c}
        tile |= {"BLOCK_O": triton.next_power_of_2(channels)}
        kernel = concat_pointwise_backward._concat_gradients_kernel
        yield kernel, shared | tile | {"RESIZES": resizes}, backward.warps, backward.stages


def nodes_of_products(storage: str, large: bool) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `products`, one for each width of the cells."""
    dtype, acc = DTYPES[storage], {"K": BRANCHES, "ACC": tl.float32}
    shared: dict[str, Any] = acc | {"OPERAND": OPERANDS[storage]}
    for channels in (32, 48, 64, 128):
        block, positions = product_sum.block_of(channels), 2**22 // channels
        statistics = covariance.CovarianceConfig.default(channels, dtype)
        tile = {"BLOCK_M": statistics.block_m, "BLOCK_C": statistics.block_c, "BLOCKS": 1}
        tile |= {"CHANNELS_MASKED": channels < statistics.block_c}
        kernel: Any = covariance._shares_kernel
        yield kernel, shared | tile, statistics.warps, statistics.stages
        shares = min(covariance.SHARES_AT_ONCE, covariance.MERGED // (covariance.ROWS * block))
        entries = {"K": BRANCHES, "BLOCKS": 1, "BLOCK_C": statistics.block_c, "BLOCK_S": shares}
        entries |= {"ROWS": covariance.ROWS, "COLUMNS": block}
        yield covariance._merge_kernel, entries, covariance.merging_warps(shares, block), 3
        forward = product_sum.ProductSumConfig.default(channels, channels, dtype, large)
        tile = {"BLOCK_M": forward.block_m, "BLOCK_C": forward.block_c, "BLOCK_O": block}
        tile |= {"R": BRANCHES, "J": PLAIN, "STAGES": forward.stages, "BLOCK_K": 32}
        tile |= {"BLOCKS": triton.cdiv(channels, forward.block_c)}
        yield product_sum._product_sum_kernel, shared | tile, forward.warps, forward.stages
        arguments = (BRANCHES, positions, channels, channels, dtype, large)
        sums = product_gradients.ProductSumsConfig.default(*arguments)
        tile = {"BLOCK_M": sums.block_m, "BLOCK_C": sums.block_c, "BLOCK_O": block}
        kernel = product_gradients._sums_kernel
        yield (
            kernel,
            shared | tile | {"MAPS": sums.maps, "STAGES": sums.stages},
            sums.warps,
            sums.stages,
        )
        backward = product_gradients.InputGradientsConfig.default(*arguments)
        tile = {"BLOCK_M": backward.block_m, "BLOCK_N": backward.block_n, "BLOCKS": 1}
        tile |= {"BLOCK_C": block, "BLOCK_O": block, "FROM_MAP": True, "SHIFTED": True}
        kernel = product_gradients._input_gradients_kernel
        yield kernel, shared | tile, backward.warps, backward.stages
        rows = acc | {"ROWS": product_algebra.ROWS, "BLOCK_C": block}
        rows |= {"TERMS": product_algebra.terms(channels, channels)}
        warps = product_algebra._warps(channels)
        yield product_algebra._weights_kernel, rows | {"EPS": 1e-5}, warps, 3
        yield product_algebra._coefficients_kernel, rows | {"TRAINING": True}, warps, 3


def gradients_of_products(
    storage: str, arch: int
) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `products`, one for each width of the cells."""
    dtype = DTYPES[storage]
    for channels in (32, 64, 128):
        default = pointwise_backward.ProductGradientsConfig.default
        config = default(BRANCHES, 2**20 // channels, channels, channels, dtype)
        tile = {"BLOCK_M": config.block_m, "BLOCK_C": config.block_c, "BLOCK_O": channels}
        tile |= {"BRANCHES": BRANCHES, "ACC": tl.float32, "OPERAND": OPERANDS[storage]}
        rest = {"REST": config.rest}
        yield (
            pointwise_backward._product_gradients_kernel, tile | rest, config.warps, config.stages,
        )  # fmt: skip
        half = {name: value for name, value in tile.items() if name != "BRANCHES"}
        yield interleaved._interleaved_gradients_kernel, half, config.warps, config.stages
        of_map = {name: value for name, value in half.items() if name != "BLOCK_C"}
        of_map |= {"BLOCK_M": interleaved.BLOCK_M, "BLOCK_K": min(interleaved.BLOCK_K, channels)}
        yield interleaved._interleaved_kernel, of_map, interleaved.WARPS, 3
        if storage != "fp32" and arch >= 90:
            shape = (16, channels, 2048 // channels, 4096 // channels)
            walk = conv3_backward.WeightGradConfig.default(PLAIN, shape, channels)
            windows = {"BLOCK_P": walk.block_p, "BLOCK_C": walk.block_c, "BLOCK_O": walk.block_o}
            windows |= {"BRANCHES": PLAIN, "ACC": tl.float32, "OPERAND": OPERANDS[storage]}
            windows |= {"STAGES": walk.stages, "RELU": True}
            yield conv3_backward._conv3_weight_grad_kernel, windows, walk.warps, 3
            yield from edges_of_a_map(storage, shape)
            yield from convolutions_of_stride_2(storage, shape)
    if storage != "fp32" and arch >= 90:
        small, large = (16, 48, 32, 64), (16, 128, 64, 128)
        for shape, channels in (((16, 16, 64, 128), 8), (small, 48), (large, 64)):
            yield from convolutions_of_stride_2(storage, shape, channels)
        yield from walks(storage)


def convolutions_of_stride_2(
    storage: str, shape: tuple[int, ...], channels: int | None = None
) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `products`; shape: of a result, channels: of the map, by default as many."""
    images, out_channels, height, width = shape
    channels = channels or out_channels
    shared: dict[str, Any] = {"ACC": tl.float32, "OPERAND": OPERANDS[storage]}
    shared |= {"C": channels, "CO": out_channels}
    config, kernel = conv3_stride2.Stride2Config, conv3_stride2._strided_kernel
    choices = [
        (
            conv3_stride2._transposed_kernel,
            config.transposed(shape, channels),
            {"SOURCES": 1, "RELU": True},
        )
    ]
    for targets in (1, 2):
        tile = config.strided(shape, out_channels, DTYPES[storage], targets)
        counts = {"TARGETS": targets, "GROUP": tile.targets, "MASKED": targets == 1}
        choices.append((kernel, tile, counts))
    for kernel, tile, counts in choices:
        options = {"ROWS": tile.rows, "BLOCK_P": tile.block_p, "BLOCK_N": tile.block_n}
        options |= {"BLOCK_K": tile.block_k, "STAGES": tile.stages}
        yield kernel, shared | options | counts, tile.warps, 3
    walk = conv3_stride2_backward.StridedWeightGradConfig.default(
        2, (images, channels, 2 * height, 2 * width), out_channels, DTYPES[storage]
    )
    options = {"ROWS": walk.rows, "BLOCK_P": walk.block_p, "BLOCK_O": walk.block_o}
    options |= {"BLOCK_K": walk.block_k, "STAGES": walk.stages, "BRANCHES": 2, "RELU": True}
    yield conv3_stride2_backward._strided_weight_grad_kernel, shared | options, walk.warps, 3


def edges_of_a_map(
    storage: str, shape: tuple[int, ...]
) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `products`: one 3x3 convolution and two, and their gradients."""
    channels = shape[1]
    for edges in (1, 2):
        for backward in (False, True):
            sources, targets = (edges, 1) if backward else (1, edges)
            tile = conv3.Conv3Config.default(shape, channels, channels, DTYPES[storage], targets)
            options = {"SOURCES": sources, "TARGETS": targets, "BACKWARD": backward, "RELU": True}
            options |= {"BLOCKS_C": channels // tile.block_c, "WHOLE": True, "ROWS": tile.rows}
            options |= {"BLOCK_P": tile.block_p, "BLOCK_O": tile.block_o, "BLOCK_C": tile.block_c}
            options |= {"GROUP": tile.targets, "STAGES": tile.stages}
            options |= {"ACC": tl.float32, "OPERAND": OPERANDS[storage]}
            yield conv3._conv3_kernel, options, tile.warps, 3


def walks(storage: str) -> Iterator[tuple[Any, dict[str, Any], int, int]]:
    """As `products`: those of 48 channels, to few and to many."""
    shared = {"C": 48, "RELU": True, "ACC": tl.float32, "OPERAND": OPERANDS[storage]}
    shared |= {"MOST_K": 128, "REST_K": 16}
    for channels in (48, 144):
        for backward in (False, True):
            tile = conv3_walk.WalkConfig.default(48, channels, DTYPES[storage], backward)
            options = shared | {"BACKWARD": backward, "STAGES": tile.stages}
            options |= {"BLOCK_P": tile.block_p, "BLOCK_O": tile.block_o}
            yield conv3_walk._conv3_walk_kernel, options, tile.warps, 3


def compile_for(
    kernel: Any, constants: dict[str, Any], warps: int, arch: int, storage: str, stages: int = 3
) -> Any:
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in LISTS or name in WEIGHTS:
            count = LISTS[name] if name in LISTS else _weights(name, constants)
            signature[name] = (f"*{storage if name in LISTS else 'fp32'}",) * count
            attributes |= {(index, part): DIVISIBLE for part in range(count)}
        elif name.endswith("_ptr"):
            signature[name] = f"*{storage if name in MAPS else POINTERS.get(name, 'fp32')}"
            attributes[(index,)] = DIVISIBLE
        else:
            signature[name] = SCALARS.get(name, "i32")
            if name in MULTIPLES_OF_16:
                attributes[(index,)] = DIVISIBLE
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": warps, "num_stages": stages}
    if constants.get("PARTS") == 2:
        options["maxnreg"] = depthwise_weight_grad.MOST_REGISTERS
    return triton.compile(source, target=target, options=options)


def _weights(name: str, constants: dict[str, Any]) -> int:
    """Pointers in a list of weights."""
    if constants["AFFINE"]:
        return int(constants["K"])
    return 1 if name == "z_ptrs" else 0


def resources(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "-res-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
    assert found, report.stdout
    registers, stack = map(int, found.groups())
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


UNSTORED = r"(?:(?!st\.global).)*"
HANDOVER = rf"bar\.sync{UNSTORED}atom\.global\.gpu\.acq_rel.*?bar\.sync.*?ld\.global\.cg"
"""All threads have stored their shares; the count; all know of it; what others stored."""


def handovers(ptx: str) -> dict[str, int]:
    """The atomic operations of a kernel, and those of them with what must be around them."""
    atomics = re.findall(r"\b(?:atom|red)\.", ptx)
    return {"atomics": len(atomics), "handovers": len(re.findall(HANDOVER, ptx, re.DOTALL))}


def main() -> None:
    arch, storage = int(sys.argv[1]), sys.argv[2]
    driver.set_active(StandIn(arch))
    chosen = [(*each, 3) for each in kernels()]
    chosen += convolutions_of_images(storage, arch)
    if arch >= 80:
        chosen += products(storage, arch)
    for kernel, constants, warps, stages in chosen:
        compiled = compile_for(kernel, constants, warps, arch, storage, stages)
        shown = {name: constants[name] for name in SHOWN if name in constants}
        row = {"kernel": kernel.fn.__name__} | shown | resources(compiled)
        row |= {"overwritten": overwritten(compiled.asm["ptx"])}
        print(json.dumps(row | handovers(compiled.asm["ptx"])), flush=True)


if __name__ == "__main__":
    main()
