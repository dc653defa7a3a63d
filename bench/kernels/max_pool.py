"""Max pooling 3x3 in Triton against PyTorch's: `python -m bench.kernels.max_pool`.

Floors: x + y forward, with the winners another byte an output; winners + dy + dx backward.
PyTorch's backward pass reads 64-bit indices, which its forward pass writes whenever there will be a
gradient; both do here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.keys import case_of_key
from bench.kernels.shapes import CELLS, INPUTS, Shape, Size, at_stride, cell_shapes
from bench.kernels.timing import Call
from lgcnet_fast.kernels.max_pool import (
    PoolConfig,
    max_pool_backward,
    max_pool_forward,
    max_pool_winners,
)
from lgcnet_fast.ops.tuning import shape_key

FORWARD_TILES = [(4, 8, 64), (8, 8, 64), (4, 16, 64), (4, 16, 32), (8, 16, 32), (4, 32, 32)]
BACKWARD_TILES = [
    *[(4, 16, 64), (8, 16, 64), (2, 16, 64), (4, 8, 64), (2, 8, 64)],
    *[(4, 32, 32), (8, 32, 32)],
]
"""Rows, columns and channels of a tile."""


@dataclass(frozen=True)
class Case:
    shape: Shape
    stride: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape} s{self.stride} {str(self.dtype).removeprefix('torch.')}"

    @property
    def out_size(self) -> tuple[int, int]:
        return -(-self.shape[2] // self.stride), -(-self.shape[3] // self.stride)

    def bytes(self, winners: bool) -> int:
        x, y = torch.Size(self.shape), torch.Size((*self.shape[:2], *self.out_size))
        return (x.numel() + y.numel()) * self.dtype.itemsize + winners * y.numel()


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    dy: Tensor
    winners: Tensor


def make_inputs(case: Case) -> Inputs:
    def values(height: int, width: int) -> Tensor:
        shape = (case.shape[0], height, width, case.shape[1])
        return torch.randn(shape, device=DEVICE, dtype=case.dtype).movedim(-1, 1)

    x = values(*case.shape[2:])
    return Inputs(x, values(*case.out_size), max_pool_winners(x, case.stride)[1])


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        for stride in (1, 2):
            yield Case((1, 4, 5, 3), stride)
        return
    for size in INPUTS:
        shapes = cell_shapes(size)
        for shape, stride in itertools.product(shapes, (1, 2)):
            if part == "full" or size == (256, 512) or (shape, stride) == (shapes[0], 1):
                yield Case(shape, stride)
        if part == "full" or size == (256, 512):
            yield from reducing_cells(size)
    yield Case(cell_shapes((256, 512))[0], 1, torch.float32)


def reducing_cells(size: Size) -> Iterator[Case]:
    """Their inputs have the next stage's channels already."""
    for (channels, _), (_, stride) in zip(CELLS[1:], CELLS, strict=False):
        yield Case((INPUTS[size], channels, *at_stride(size, stride)), 2)


def forward(case: Case, i: Inputs, config: PoolConfig | None = None) -> Tensor:
    return max_pool_forward(i.x, case.stride, config)


def backward(case: Case, i: Inputs, config: PoolConfig | None = None) -> Tensor:
    return max_pool_backward(i.winners, [i.dy], case.shape[2:], case.stride, config)


def winners(case: Case, i: Inputs, config: PoolConfig | None = None) -> tuple[Tensor, Tensor]:
    return max_pool_winners(i.x, case.stride, config)


def stock_forward(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and indices."""
    return torch.ops.aten.max_pool2d_with_indices(x, [3, 3], [case.stride] * 2, [1, 1])


def stock_backward(case: Case, x: Tensor, dy: Tensor, indices: Tensor) -> Tensor:
    window = ([3, 3], [case.stride] * 2, [1, 1], [1, 1], False)
    return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *window, indices)


def check_forward(case: Case, i: Inputs) -> None:
    if not torch.equal(forward(case, i), stock_forward(case, i.x)[0]):
        raise SystemExit(f"WRONG RESULT: forward {case}")


def check_winners(case: Case, i: Inputs) -> None:
    if not torch.equal(winners(case, i)[0], stock_forward(case, i.x)[0]):
        raise SystemExit(f"WRONG RESULT: winners {case}")


def check_backward(case: Case, i: Inputs) -> None:
    x = i.x.double()
    truth = stock_backward(case, x, i.dy.double(), stock_forward(case, x)[1])
    bound = torch.finfo(case.dtype).eps * truth.abs() + 1e-5
    if not ((backward(case, i).double() - truth).abs() <= bound).all():
        raise SystemExit(f"WRONG RESULT: backward {case}")


def _stock(case: Case, layout: torch.memory_format, gradient: bool) -> Binding:
    def bind(i: Inputs) -> Call:
        x, dy = (t.contiguous(memory_format=layout) for t in (i.x, i.dy))
        if not gradient:
            return lambda: stock_forward(case, x)
        indices = stock_forward(case, x)[1]
        return lambda: stock_backward(case, x, dy, indices)

    return bind


def comparisons(part: Part) -> Iterator[Comparison]:
    parts: list[tuple[str, Callable[[Case, Inputs], Any], Callable[[Case, Inputs], None]]] = [
        ("forward", forward, check_forward),
        ("forward with winners", winners, check_winners),
        ("backward", backward, check_backward),
    ]
    for case, (direction, ours, check) in itertools.product(cases(part), parts):
        gradient = direction == "backward"
        elements = torch.Size(case.shape).numel()
        yield Comparison(
            operation=f"max pool {direction}",
            case=str(case),
            bytes=case.bytes(direction != "forward"),
            operations=9 * elements // case.stride**2,
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case, check=check: check(case, i),
            ours=lambda i, case=case, ours=ours: ours(case, i),
            stock={name: _stock(case, layout, gradient) for name, layout in LAYOUTS.items()},
        )


def key_of(case: Case) -> str:
    return shape_key(case.dtype, case.shape, (case.stride,))


def case_of(key: str) -> Case:
    def read(dtype: torch.dtype, shape: Any, window: Any) -> Case:
        (stride,) = window
        return Case(shape, stride, dtype)

    return case_of_key(key, read, key_of)


def forward_sweep(key: str) -> Sweep:
    return _sweep("forward", forward, case_of(key), PoolConfig.forward, FORWARD_TILES)


def backward_sweep(key: str) -> Sweep:
    return _sweep("backward", backward, case_of(key), PoolConfig.backward, BACKWARD_TILES)


def _sweep(
    direction: str,
    run: Callable[[Case, Inputs, PoolConfig], Tensor],
    case: Case,
    default: Callable[[Any], PoolConfig],
    tiles: list[tuple[int, int, int]],
) -> Sweep:
    return Sweep(
        operation=f"max_pool_{direction}",
        key=key_of(case),
        bytes=case.bytes(winners=direction == "backward"),
        make=lambda: make_inputs(case),
        run=lambda i, config: run(case, i, config),
        configs=[
            default((*case.shape[:2], *case.out_size)),
            *(PoolConfig(*tile, warps=4) for tile in tiles),
        ],
    )


FAMILY = Family(
    "max pooling",
    comparisons,
    swept={"max_pool_forward": forward_sweep, "max_pool_backward": backward_sweep},
)

if __name__ == "__main__":
    main(FAMILY)
