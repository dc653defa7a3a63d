"""The CUDA depthwise kernels: `python -m bench.kernels.native_depthwise` (see command.py).

The multiply-adds, 9 an output forward and 18 backward, take at most a third of the floor of bytes
on any GPU since Pascal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part, Sweep
from bench.kernels.depthwise_cases import (
    Case,
    Inputs,
    comparisons,
    make_inputs,
    single_branches,
)
from bench.kernels.shapes import INPUTS, Size, cell_shapes
from lgcnet_fast.native import instances
from lgcnet_fast.native.depthwise import (
    Tile,
    backward_tile,
    depthwise_backward,
    depthwise_forward,
    forward_tile,
)
from lgcnet_fast.native.operands import STORAGE
from lgcnet_fast.ops.tuning import shape_key


def forward(case: Case, i: Inputs, tile: Tile | None = None) -> Tensor:
    (dilation,) = case.dilations
    y = depthwise_forward(i.x, i.weights[0, 0], dilation=dilation, stride=case.stride, tile=tile)
    return y[None, None]


def backward(case: Case, i: Inputs, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    (dilation,) = case.dilations
    dx, dw = depthwise_backward(
        i.x, i.weights[0, 0], i.dy[0, 0], dilation=dilation, stride=case.stride, tile=tile
    )
    return dx, dw[None, None]


def all_comparisons(part: Part) -> Iterator[Comparison]:
    for case in single_branches(part):
        yield from comparisons(case, forward, backward)


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for size in (None,) if tiny else INPUTS:
        yield from _sweeps(size)


def _sweeps(size: Size | None) -> Iterator[Sweep]:
    for case, kernel in itertools.product(_swept(size), (forward, backward)):
        found = list(tiles(case, kernel is backward))
        yield Sweep(
            operation=f"native_depthwise_{kernel.__name__}",
            key=shape_key(case.dtype, case.shape, case.dilations, (case.stride,)),
            bytes=case.y_bytes + case.x_bytes * (2 if kernel is backward else 1),
            make=lambda case=case: make_inputs(case),
            run=lambda i, tile, case=case, kernel=kernel: kernel(case, i, tile),
            configs=found if size else found[:1],
        )


def _swept(size: Size | None) -> Iterator[Case]:
    if size is None:
        yield Case((1, 8, 3, 5), (1,))
        return
    for shape, dtype in itertools.product(cell_shapes(size), (torch.float32, torch.float16)):
        yield from (Case(shape, (d,), dtype=dtype) for d in (1, 4))
        yield Case(shape, (1,), stride=2, dtype=dtype)


def tiles(case: Case, gradients: bool) -> Iterator[Tile]:
    """The default, then every compiled kernel with a few sizes of block and numbers of blocks."""
    i = make_inputs(case)
    stride = 2 if case.stride == 2 and case.dilations[0] % 2 else 1  # the kernel's own
    dy = i.dy[0, 0]
    yield backward_tile(i.x, dy, stride=stride) if gradients else forward_tile(i.x, dy)
    for one in instances.all_instances():
        if not one.kernel.startswith("depthwise") or STORAGE[case.dtype] not in one.parameters[0]:
            continue
        vector, *walk = map(int, one.parameters[1:])
        if vector == 1:
            continue
        if one.kernel == "depthwise_forward" and not gradients and walk[0] == stride:
            narrow = vector * case.dtype.itemsize <= 8
            yield from (Tile(vector, *walk[1:], n) for n in (128, 256, *((512,) if narrow else ())))
        elif gradients and one.kernel == (
            "depthwise_backward" if stride == 1 else "depthwise_backward_stride2"
        ):
            columns, rows = walk or (1, 1)
            for threads, blocks in ((128, 2), (128, 4), (128, 8), (256, 1), (256, 2), (256, 4)):
                yield Tile(vector, columns, rows, threads, blocks)


FAMILY = Family("CUDA depthwise", all_comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
