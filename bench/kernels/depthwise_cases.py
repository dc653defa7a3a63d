"""Depthwise 3x3 convolutions: cases, float64 truth and what PyTorch does, for both backends.

Floors, in bytes: x + y forward, x + dy + dx backward; with K branches x + K y and x + K dy + dx.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.comparison import Comparison, Part
from bench.kernels.shapes import (
    CELLS,
    INPUTS,
    Shape,
    Size,
    at_stride,
    cell_shapes,
    depthwise_uses,
    random_shapes,
)
from bench.kernels.timing import Call, gate

DILATIONS = (1, 2, 4, 8, 12)
DTYPES = (torch.bfloat16, torch.float32)
CROP = (256, 512)


@dataclass(frozen=True)
class Case:
    """Convolutions of one x: `edges` of each dilation."""

    shape: Shape
    dilations: tuple[int, ...]
    stride: int = 1
    edges: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dilations = ",".join(map(str, self.dilations))
        edges = f" e{self.edges}" if self.edges > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} d{dilations} s{self.stride}{edges} {dtype}"

    @property
    def out_size(self) -> tuple[int, int]:
        return at_stride(self.shape[2:], self.stride)

    @property
    def maps(self) -> int:
        return self.edges * len(self.dilations)

    @property
    def x_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def y_bytes(self) -> int:
        elements = torch.Size((*self.shape[:2], *self.out_size)).numel()
        return self.maps * elements * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    """(N, C, H, W), NHWC in memory, as `dy`."""
    weights: Tensor
    """(edges, branches, 3, 3, C) float32."""
    dy: Tensor
    """(edges, branches, N, C, H', W')."""


Kernel = Callable[[Case, Inputs], Any]


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape
    branches = len(case.dilations)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=case.dtype).movedim(-1, -3)

    return Inputs(
        values(images, height, width, channels),
        torch.randn(case.edges, branches, 3, 3, channels, device=DEVICE),
        values(case.edges, branches, images, *case.out_size, channels),
    )


def comparisons(case: Case, forward: Kernel, backward: Kernel) -> Iterator[Comparison]:
    """forward gives y (edges, branches, N, C, H', W'); backward dx and dw, as `Inputs`."""

    def check_forward(i: Inputs) -> None:
        gate(f"forward {case}", forward(case, i), reference(i.x.double(), i.weights, case))

    def check_backward(i: Inputs) -> None:
        x, weights = i.x.double().requires_grad_(), i.weights.double().requires_grad_()
        y = reference(x, weights, case)
        truths = torch.autograd.grad(y, (x, weights), i.dy.double())
        for name, ours, truth in zip("xw", backward(case, i), truths, strict=True):
            gate(f"gradient of {name} {case}", ours, truth)

    multiply_adds = 9 * case.y_bytes // case.dtype.itemsize
    kind = "depthwise" if case.maps == 1 else "depthwise branches"
    yield Comparison(
        operation=f"{kind} forward",
        case=str(case),
        bytes=case.x_bytes + case.y_bytes,
        operations=2 * multiply_adds,
        make=lambda: make_inputs(case),
        check=check_forward,
        ours=lambda i: forward(case, i),
        stock={name: _stock(case, layout, _convolve) for name, layout in LAYOUTS.items()},
    )
    yield Comparison(
        operation=f"{kind} backward",
        case=str(case),
        bytes=2 * case.x_bytes + case.y_bytes,
        operations=4 * multiply_adds,
        make=lambda: make_inputs(case),
        check=check_backward,
        ours=lambda i: backward(case, i),
        stock={name: _stock(case, layout, _differentiate) for name, layout in LAYOUTS.items()},
    )


def reference(x: Tensor, weights: Tensor, case: Case) -> Tensor:
    """float64, as nine shifted products."""
    (height, width), stride = case.out_size, case.stride
    maps = []
    for edge in weights.double():
        for weight, d in zip(edge, case.dilations, strict=True):
            padded = F.pad(x, (d, d, d, d))
            total = torch.zeros(*x.shape[:2], height, width, dtype=x.dtype, device=x.device)
            for u, v in itertools.product(range(3), range(3)):
                window = padded[:, :, u * d :, v * d :][:, :, ::stride, ::stride]
                total = total + weight[u, v][:, None, None] * window[:, :, :height, :width]
            maps.append(total)
    return torch.stack(maps).view(case.edges, len(case.dilations), *maps[0].shape)


Branch = tuple[Tensor, int, Tensor]
"""Weight (C, 1, 3, 3), dilation and dy."""


def _stock(
    case: Case, layout: torch.memory_format, run: Callable[[Case, Tensor, list[Branch]], Any]
) -> Callable[[Inputs], Call]:
    """PyTorch's convolutions, one by one, with weights of the maps' dtype as in autocast."""

    def bind(i: Inputs) -> Call:
        x = i.x.contiguous(memory_format=layout)
        kernels = i.weights.to(case.dtype).movedim(-1, 2)[:, :, :, None].contiguous()
        branches = [
            (
                kernels[e, b].contiguous(memory_format=layout),
                d,
                i.dy[e, b].clone(memory_format=layout),
            )
            for e in range(case.edges)
            for b, d in enumerate(case.dilations)
        ]
        return lambda: run(case, x, branches)

    return bind


def _convolve(case: Case, x: Tensor, branches: list[Branch]) -> list[Tensor]:
    return [F.conv2d(x, w, None, case.stride, d, d, x.shape[1]) for w, d, _ in branches]


def _differentiate(case: Case, x: Tensor, branches: list[Branch]) -> tuple[Tensor, list[Tensor]]:
    results = []
    for w, d, dy in branches:
        options = ([case.stride] * 2, [d] * 2, [d] * 2, False, [0, 0], x.shape[1])
        mask = [True, True, False]
        results.append(torch.ops.aten.convolution_backward(dy, x, w, None, *options, mask))
    dx = results[0][0]
    for other in results[1:]:
        dx = dx + other[0]
    return dx, [result[1] for result in results]


def single_branches(part: Part) -> Iterator[Case]:
    """`full`: first every convolution that the network has, then every other dilation and stride
    of random shapes and of its own.
    """
    if part == "dry":
        yield from (
            Case((1, 4, 3, 5), (d,), s, dtype=t)
            for d, s, t in ((1, 1, DTYPES[0]), (2, 2, DTYPES[1]))
        )
    elif part == "table":
        yield from _selected()
    else:
        yield from dict.fromkeys(_everything())


def _selected() -> Iterator[Case]:
    _, large, _ = ((16, channels, *at_stride(CROP, 4)) for channels, _ in CELLS)
    shapes = [*cell_shapes(CROP), large, cell_shapes((769, 769))[1], cell_shapes((769, 1537))[1]]
    for shape, d in itertools.product(shapes, (1, 8)):
        yield Case(shape, (d,))
    for d in (1, 8):
        yield Case(large, (d,), dtype=torch.float32)
        yield Case(large, (d,), stride=2)


def _everything() -> Iterator[Case]:
    uses = [use for size in INPUTS for use in depthwise_uses(size)]
    for dtype, (shape, d, stride) in itertools.product(DTYPES, uses):
        yield Case(shape, (d,), stride, dtype=dtype)
    shapes = [*dict.fromkeys(shape for shape, _, _ in uses), *random_shapes()]
    for dtype, shape, d, stride in itertools.product(DTYPES, reversed(shapes), DILATIONS, (1, 2)):
        yield Case(shape, (d,), stride, dtype=dtype)


def cell_inputs(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case((1, 4, 3, 5), (1, 2), edges=2)
        return
    for size in INPUTS if part == "full" else (CROP,):
        yield from branches_of_nodes(size)


def branches_of_nodes(size: Size) -> Iterator[Case]:
    """What leaves a node in one launch.

    An input of a cell has two edges, each with sep3's first stage and dil3_*; the other node has
    one. Inputs of the fusion cell's edges are up to three maps side by side.
    """
    batch, dilations = INPUTS[size], DILATIONS[:-1]
    for shape in cell_shapes(size):
        yield Case(shape, dilations, edges=2)
        yield Case(shape, dilations)
    for (channels, _), (_, stride) in zip(CELLS[1:], CELLS, strict=False):
        yield Case((batch, channels, *at_stride(size, stride)), dilations, 2, edges=2)
    fused = {shape for shape, dilation, _ in depthwise_uses(size) if dilation == DILATIONS[-1]}
    yield from (Case(shape, DILATIONS) for shape in sorted(fused))
