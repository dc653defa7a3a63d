"""The Triton depthwise kernels: `python -m bench.kernels.depthwise` (see command.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part, Sweep
from bench.kernels.depthwise_cases import (
    Case,
    Inputs,
    branches_of_nodes,
    cell_inputs,
    comparisons,
    make_inputs,
    single_branches,
)
from bench.kernels.shapes import INPUTS, Size, cell_shapes
from lgcnet_fast.kernels.depthwise import ForwardConfig, depthwise_multi
from lgcnet_fast.kernels.depthwise_backward import depthwise_backward
from lgcnet_fast.kernels.depthwise_input_grad import (
    InputGradConfig,
    depthwise_multi_input_grad,
)
from lgcnet_fast.kernels.depthwise_weight_grad import (
    WeightGradConfig,
    depthwise_multi_weight_grad,
)
from lgcnet_fast.ops.tuning import shape_key


def forward(case: Case, i: Inputs, config: ForwardConfig | None = None) -> Tensor:
    return depthwise_multi(i.x, i.weights, case.dilations, case.stride, config=config)


def input_grad(case: Case, i: Inputs, config: InputGradConfig | None = None) -> Tensor:
    return depthwise_multi_input_grad(
        i.dy, i.x, i.weights, case.dilations, case.stride, config=config
    )


def weight_grad(case: Case, i: Inputs, config: WeightGradConfig | None = None) -> Tensor:
    return depthwise_multi_weight_grad(
        i.dy, i.x, i.weights, case.dilations, case.stride, config=config
    )


def fused_backward(
    case: Case, i: Inputs, config: WeightGradConfig | None = None
) -> tuple[Tensor, Tensor]:
    (dilation,) = case.dilations
    dx, dw = depthwise_backward(
        i.dy[0, 0], i.x, i.weights[0, 0], dilation, case.stride, config=config
    )
    return dx, dw[None, None]


def backward(case: Case, i: Inputs) -> tuple[Tensor, Tensor]:
    if case.maps == 1:
        return fused_backward(case, i)
    return input_grad(case, i), weight_grad(case, i)


def all_comparisons(part: Part) -> Iterator[Comparison]:
    for case in itertools.chain(single_branches(part), cell_inputs(part)):
        yield from comparisons(case, forward, backward)


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for size in (None,) if tiny else INPUTS:
        yield from _sweeps(size)


def _sweeps(size: Size | None) -> Iterator[Sweep]:
    for case in _swept(size):
        kernels = [forward, input_grad, weight_grad]
        if case.maps == 1 and case.dilations[0] % case.stride == 0:
            kernels.append(fused_backward)
        for kernel in kernels:
            found = list(tiles(kernel, case))
            x_maps = 2 if kernel is fused_backward else 1
            yield Sweep(
                operation=OPERATIONS[kernel],
                key=shape_key(case.dtype, case.shape, case.dilations, (case.stride, case.edges)),
                bytes=x_maps * case.x_bytes + case.y_bytes,
                make=lambda case=case: make_inputs(case),
                run=lambda i, config, case=case, kernel=kernel: kernel(case, i, config),
                configs=found if size else found[:1],
                input=size,
            )


OPERATIONS: dict[Any, str] = {
    forward: "depthwise_forward",
    input_grad: "depthwise_input_grad",
    weight_grad: "depthwise_weight_grad",
    fused_backward: "depthwise_backward",
}


def _swept(size: Size | None) -> Iterator[Case]:
    if size is None:
        yield Case((1, 4, 3, 5), (1,))
        return
    yield from branches_of_nodes(size)
    for shape in cell_shapes(size):  # sep3's second stage
        yield Case(shape, (1,))


def tiles(kernel: Any, case: Case) -> Iterator[Any]:
    """Tile sizes worth trying; the first is the default."""
    channels = case.shape[1]
    y_shape = (case.edges, len(case.dilations), case.shape[0], channels, *case.out_size)
    if kernel is forward:
        default = ForwardConfig.default(y_shape, case.dilations, case.stride)
        yield default
        rows, p, c, height = default.rows, default.block_p, default.block_c, case.out_size[0]
        for part in (2, 4):
            yield ForwardConfig(-(-height // part), p, c, 4)
        yield ForwardConfig(-(-height // 2), 2 * p, c, 4)  # 16 bytes a thread and load
        yield ForwardConfig(rows, p // 2, c, 2)
        yield ForwardConfig(rows, 2 * p, c, 8)  # fewer of a tile's taps outside its columns
        yield ForwardConfig(rows, 512 // _other(c), _other(c), 4)
    elif kernel is input_grad:
        default = InputGradConfig.default(y_shape, case.stride)
        yield default
        blocks = [(8, 32, 16, 2), (8, 16, 32, 2), (8, 64, 16, 4), (4, 32, 16, 4), (4, 64, 16, 4)]
        blocks += [(4, 16, 32, 4), (2, 32, 32, 4)]
        if case.stride == 2:
            blocks = [(1, 32, 16, 2), (2, 64, 16, 4), (2, 16, 32, 2), (2, 16, 32, 4)]
        others = [InputGradConfig(*block) for block in blocks]
        yield from [config for config in others if config != default]
    elif kernel is weight_grad:
        default = WeightGradConfig.default(y_shape, case.dilations, case.stride)
        yield default
        p, c, rows, programs = default.block_p, default.block_c, default.rows, default.programs
        yield WeightGradConfig(rows, p, c, 4, -(-programs * 3 // 4))
        yield WeightGradConfig(-(-rows // 2), p, c, 4, programs)
        yield WeightGradConfig(rows, p // 2, c, 2, 2 * programs)
        yield WeightGradConfig(rows, 2 * p, c, 4, -(-programs // 2))  # 16 bytes a thread and load
        yield WeightGradConfig(rows, 2 * p, c, 8, -(-programs // 2))
        yield WeightGradConfig(rows, 512 // _other(c), _other(c), 4, -(-programs * _other(c) // c))
    else:
        yield WeightGradConfig.default(y_shape, case.dilations, case.stride)
        blocks = [(8, 16, 32, 4, 264), (4, 16, 32, 4, 264), (4, 16, 32, 4, 528), (4, 8, 64, 4, 264)]
        blocks += [(2, 16, 32, 4, 396), (8, 8, 32, 2, 528), (4, 8, 32, 2, 528)]
        for rows, p, c, warps, programs in blocks:
            yield WeightGradConfig(rows, p, c, warps, -(-programs // -(-channels // c)))


def _other(block_c: int) -> int:
    """Another width of a tile: one memory transaction of 32 bytes, or two."""
    return 32 if block_c == 16 else 16


FAMILY = Family("depthwise", all_comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
