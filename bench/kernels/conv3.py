"""Dense 3x3 convolutions of a ReLU and their input gradients: `python -m bench.kernels.conv3`.

For the edges of a cell that leave the same node, one or two, and those of the fusion cell. Stock is
the ReLU and cuDNN's convolutions, one after the other, and their input gradients, which nobody
masks or sums. Floors: x and each result once, each gradient, x and dx once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.device import DEVICE
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.keys import case_of_key
from bench.kernels.shapes import (
    FUSION_CHANNELS,
    INPUTS,
    Shape,
    Size,
    cell_shapes,
    fusion_shapes,
)
from bench.kernels.timing import Call, gate
from lgcnet_fast.kernels.conv3 import Conv3Config, conv3_forward, conv3_input_grad
from lgcnet_fast.kernels.conv3_walk import conv3_walk, conv3_walk_input_grad, walks
from lgcnet_fast.ops.tuning import shape_key

GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@dataclass(frozen=True)
class Case:
    shape: Shape
    edges: int
    out_channels: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape} E{self.edges} {str(self.dtype).removeprefix('torch.')}"

    @property
    def positions(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]

    @property
    def operations(self) -> int:
        return 18 * self.edges * self.positions * self.shape[1] * self.out_channels

    def bytes(self, maps: int) -> int:
        """Of all results, and so many maps like x."""
        channels = maps * self.shape[1] + self.edges * self.out_channels
        return self.positions * channels * self.dtype.itemsize

    def default(self, backward: bool) -> Conv3Config:
        channels, out_channels = self.shape[1], self.out_channels
        if backward:
            return Conv3Config.default(self.shape, out_channels, channels, self.dtype)
        return Conv3Config.default(self.shape, channels, out_channels, self.dtype, self.edges)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    """NHWC, as all."""
    gs: list[Tensor]
    weights: list[Tensor]


def make_inputs(case: Case) -> Inputs:
    images, channels, *size = case.shape

    def maps(*shape: int) -> list[Tensor]:
        stack = torch.randn(shape, device=DEVICE, dtype=case.dtype)
        return list(stack.movedim(-1, 2).unbind())

    (x,) = maps(1, images, *size, channels)
    gs = maps(case.edges, images, *size, case.out_channels)
    return Inputs(x, gs, maps(case.edges, case.out_channels, 3, 3, channels))


def cases(size: Size | None) -> Iterator[Case]:
    """Those of an input size; a tiny one if there is none."""
    if size is None:
        yield Case((1, 32, 3, 5), 2, 32)
        return
    for shape in cell_shapes(size):
        yield Case(shape, 2, shape[1])
        yield Case(shape, 1, shape[1])
    for shape in fusion_shapes(size):
        yield Case(shape, 1, FUSION_CHANNELS)


def forward(i: Inputs, config: Conv3Config | None = None) -> list[Tensor]:
    if config is None and len(i.weights) == 1 and walks(i.x):
        return [conv3_walk(i.x, i.weights[0], True)]
    return conv3_forward(i.x, i.weights, True, config)


def backward(i: Inputs, config: Conv3Config | None = None) -> Tensor:
    if config is None and len(i.gs) == 1 and walks(i.gs[0]):
        return conv3_walk_input_grad(i.gs[0], i.x, i.weights[0], True)
    return conv3_input_grad(i.gs, i.x, i.weights, True, config)


def check_forward(case: Case, i: Inputs) -> None:
    for y, weight in zip(forward(i), i.weights, strict=True):
        gate(f"y {case}", y, F.conv2d(F.relu(i.x.double()), weight.double(), padding=1))


def check_backward(case: Case, i: Inputs) -> None:
    total = torch.zeros_like(i.x, dtype=torch.float64)
    for g, weight in zip(i.gs, i.weights, strict=True):
        total += F.conv_transpose2d(g.double(), weight.double(), padding=1)
    gate(f"dx {case}", backward(i), total * (i.x > 0))


def _convolutions(i: Inputs) -> Call:
    convolution = torch.ops.aten.convolution

    def call() -> list[Tensor]:
        rectified = F.relu(i.x)
        return [convolution(rectified, weight, None, *GEOMETRY) for weight in i.weights]

    return call


def _gradients(i: Inputs) -> Call:
    of_map = torch.ops.aten.convolution_backward
    pairs = list(zip(i.gs, i.weights, strict=True))
    wanted = [True, False, False]
    return lambda: [of_map(g, i.x, weight, None, *GEOMETRY, wanted)[0] for g, weight in pairs]


STOCK_FORWARD: dict[str, Binding] = {"relu and convolutions": _convolutions}
STOCK_BACKWARD: dict[str, Binding] = {"convolutions": _gradients}


def comparisons(part: Part) -> Iterator[Comparison]:
    sizes = {"dry": [None], "full": list(INPUTS)}.get(part, [(256, 512), (769, 769)])
    for case in (case for size in sizes for case in cases(size)):
        shared: dict[str, Any] = {"case": str(case), "operations": case.operations}
        shared |= {"make": partial(make_inputs, case)}
        yield Comparison(
            operation="3x3 forward",
            bytes=case.bytes(1),
            check=partial(check_forward, case),
            ours=forward,
            stock=STOCK_FORWARD,
            **shared,
        )
        yield Comparison(
            operation="3x3 input gradient",
            bytes=case.bytes(2),
            check=partial(check_backward, case),
            ours=backward,
            stock=STOCK_BACKWARD,
            **shared,
        )


def key_of(case: Case) -> str:
    return shape_key(case.dtype, case.shape, (case.edges, case.out_channels))


def case_of(key: str) -> Case:
    def read(dtype: torch.dtype, shape: Any, edges: Any) -> Case:
        count, out_channels = edges
        return Case(shape, count, out_channels, dtype)

    return case_of_key(key, read, key_of)


def sweep_forward(key: str) -> Sweep:
    case = case_of(key)
    return Sweep(
        operation="conv3_forward",
        key=key_of(case),
        bytes=case.bytes(1),
        make=lambda: make_inputs(case),
        run=forward,
        configs=list(tiles(case.default(False), case.edges)),
        stock=STOCK_FORWARD,
    )


def sweep_backward(key: str) -> Sweep:
    case = case_of(key)
    return Sweep(
        operation="conv3_input_grad",
        key=key_of(case),
        bytes=case.bytes(2),
        make=lambda: make_inputs(case),
        run=backward,
        configs=list(tiles(case.default(True), 1)),
        stock=STOCK_BACKWARD,
    )


def tiles(default: Conv3Config, targets: int) -> Iterator[Conv3Config]:
    """Tiles worth trying; the first is the default."""
    yield default
    yield replace(default, rows=6 - default.rows)
    yield replace(default, stages=4)
    yield replace(default, stages=2, block_c=64)
    if targets % 2 == 0:
        yield replace(default, targets=3 - default.targets)
    if default.block_o > 32:
        yield replace(default, block_o=32)


FAMILY = Family(
    "3x3 convolutions of a ReLU",
    comparisons,
    swept={"conv3_forward": sweep_forward, "conv3_input_grad": sweep_backward},
)

if __name__ == "__main__":
    main(FAMILY)
