"""The Triton depthwise kernels: `python -m bench.kernels.depthwise` (see command.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part, Sweep
from bench.kernels.depthwise_cases import (
    Case,
    Inputs,
    cell_inputs,
    comparisons,
    make_inputs,
    single_branches,
)
from bench.kernels.keys import case_of_key
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


KERNELS: dict[str, Any] = {
    "depthwise_forward": forward,
    "depthwise_input_grad": input_grad,
    "depthwise_weight_grad": weight_grad,
    "depthwise_backward": fused_backward,
}


def key_of(case: Case) -> str:
    return shape_key(case.dtype, case.shape, case.dilations, (case.stride, case.edges))


def case_of(key: str) -> Case:
    def read(dtype: torch.dtype, shape: Any, dilations: Any, launch: Any) -> Case:
        return Case(shape, dilations, *launch, dtype=dtype)

    return case_of_key(key, read, key_of)


def sweep(operation: str, key: str) -> Sweep:
    case, kernel = case_of(key), KERNELS[operation]
    x_maps = 2 if kernel is fused_backward else 1
    return Sweep(
        operation=operation,
        key=key_of(case),
        bytes=x_maps * case.x_bytes + case.y_bytes,
        make=lambda: make_inputs(case),
        run=lambda i, config: kernel(case, i, config),
        configs=list(tiles(kernel, case)),
    )


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
        if case.dilations[0] % case.stride:
            if case.dilations[0] > 1:  # runs the two separate kernels, with their defaults
                return
            blocks = [
                (4, 8, 32, 2, 660),
                (2, 8, 32, 2, 792),
                (8, 4, 32, 2, 660),
                (4, 4, 64, 4, 528),
            ]
            yield from (
                WeightGradConfig(*block, -(-n // -(-channels // block[2]))) for *block, n in blocks
            )
            return
        blocks = [(8, 16, 32, 4, 264), (4, 16, 32, 4, 264), (4, 16, 32, 4, 528), (4, 8, 64, 4, 264)]
        blocks += [(2, 16, 32, 4, 396), (8, 8, 32, 2, 528), (4, 8, 32, 2, 528)]
        for rows, p, c, warps, programs in blocks:
            if 0 < channels % c <= 16:  # the last block would be mostly empty
                p, c = p * c // 16, 16
            yield WeightGradConfig(rows, p, c, warps, -(-programs // -(-channels // c)))


def _other(block_c: int) -> int:
    """Another width of a tile: one memory transaction of 32 bytes, or two."""
    return 32 if block_c == 16 else 16


FAMILY = Family(
    "depthwise", all_comparisons, swept={name: partial(sweep, name) for name in KERNELS}
)

if __name__ == "__main__":
    main(FAMILY)
