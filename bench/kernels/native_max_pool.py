"""The CUDA max pooling kernels: `python -m bench.kernels.native_max_pool` (see command.py).

Cases are those of max_pool.py. These kernels write no winners; the gradient finds them in x again,
so its floor is x + dy + dx.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.kernels import max_pool
from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part, Sweep
from bench.kernels.max_pool import Case, Inputs, make_inputs, stock_backward, stock_forward
from bench.kernels.shapes import INPUTS, cell_shapes
from bench.kernels.timing import gate
from lgcnet_fast.native import instances
from lgcnet_fast.native.max_pool import (
    Tile,
    backward_tile,
    forward_tile,
    max_pool_backward,
    max_pool_forward,
)
from lgcnet_fast.native.operands import STORAGE
from lgcnet_fast.ops.tuning import shape_key


def forward(case: Case, i: Inputs, tile: Tile | None = None) -> Tensor:
    return max_pool_forward(i.x, case.stride, tile=tile)


def backward(case: Case, i: Inputs, tile: Tile | None = None) -> Tensor:
    return max_pool_backward(i.x, i.dy, case.stride, tile=tile)


def check_forward(case: Case, i: Inputs) -> None:
    gate(f"forward {case}", forward(case, i), stock_forward(case, i.x.double())[0])


def check_backward(case: Case, i: Inputs) -> None:
    x = i.x.double()
    truth = stock_backward(case, x, i.dy.double(), stock_forward(case, x)[1])
    gate(f"backward {case}", backward(case, i), truth)


def comparisons(part: Part) -> Iterator[Comparison]:
    checks = {"max pool forward": (forward, check_forward)}
    checks["max pool backward"] = (backward, check_backward)
    beside = (one for one in max_pool.comparisons(part) if one.operation in checks)
    both = (case for case in max_pool.cases(part) for _ in checks)
    for one, case in zip(beside, both, strict=True):
        run, check = checks[one.operation]
        ours, bytes_moved = partial(run, case), _bytes(case, run is backward)
        yield replace(one, ours=ours, check=partial(check, case), bytes=bytes_moved)


def _bytes(case: Case, gradient: bool) -> int:
    x = torch.Size(case.shape).numel()
    return case.bytes(winners=False) + gradient * x * case.dtype.itemsize


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for case, run in itertools.product(_swept(tiny), (forward, backward)):
        found = list(tiles(case, run is backward))
        yield Sweep(
            operation=f"native_max_pool_{run.__name__}",
            key=shape_key(case.dtype, case.shape, (case.stride,)),
            bytes=_bytes(case, run is backward),
            make=partial(make_inputs, case),
            run=partial(run, case),
            configs=found[:1] if tiny else found,
        )


def _swept(tiny: bool) -> Iterator[Case]:
    if tiny:
        yield from max_pool.cases("dry")
        return
    shapes = [shape for size in INPUTS for shape in cell_shapes(size)]
    for shape, stride, dtype in itertools.product(shapes, (1, 2), (torch.float32, torch.float16)):
        yield Case(shape, stride, dtype)


def tiles(case: Case, gradients: bool) -> Iterator[Tile]:
    """The default, then every compiled vector with a few lengths of walk and sizes of block."""
    i = make_inputs(case)
    yield backward_tile(i.x, i.dy, i.x) if gradients else forward_tile(i.x, i.dy)
    wide = instances.vectors(STORAGE[case.dtype])[0]
    for vector, rows in itertools.product((4, 2) if gradients else (wide,), (2, 4, 8, 16)):
        yield from (Tile(vector, rows, threads) for threads in (128, 256))


FAMILY = Family("CUDA max pooling", comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
