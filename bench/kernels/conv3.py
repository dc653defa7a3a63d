"""Dense 3x3 convolutions with batch statistics in Triton against cuDNN's.

    python -m bench.kernels.conv3 --out FILE

ReLU, convolution and statistics, on the maps of the cells and of the fusion cell, strides 1 and 2.
Floors: x and y once (from 64 channels on the matrix units take longer, see `operations`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.products import gate_statistics, stock_statistics, tiles
from bench.kernels.shapes import FUSION_CHANNELS, INPUTS, Shape, at_stride, cell_shapes
from bench.kernels.timing import Call, gate
from lgcnet_fast.kernels.conv3 import conv3, default_config
from lgcnet_fast.kernels.pointwise import ProductConfig
from lgcnet_fast.ops.tuning import shape_key


@dataclass(frozen=True)
class Case:
    shape: Shape
    out_channels: int
    stride: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} to {self.out_channels} s{self.stride} {dtype}"

    @property
    def positions(self) -> int:
        height, width = (-(-length // self.stride) for length in self.shape[2:])
        return self.shape[0] * height * width

    @property
    def bytes(self) -> int:
        elements = torch.Size(self.shape).numel() + self.positions * self.out_channels
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    """Channels last."""


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape
    x = torch.randn(images, height, width, channels, device=DEVICE, dtype=case.dtype)
    weight = torch.randn(case.out_channels, 3, 3, channels, device=DEVICE, dtype=case.dtype)
    return Inputs(x.movedim(-1, 1), weight.movedim(-1, 1))


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case((1, 4, 5, 3), 6, 2)
        return
    for size, batch in INPUTS.items():
        if part != "full" and size not in ((256, 512), (769, 769)):
            continue
        fusion = (batch, FUSION_CHANNELS, *at_stride(size, 4))
        concatenated = (batch, 3 * FUSION_CHANNELS, *at_stride(size, 4))
        for shape, stride in itertools.product([*cell_shapes(size), fusion], (1, 2)):
            if stride == 1 or part == "full":
                yield Case(shape, shape[1], stride)
        yield Case(concatenated, FUSION_CHANNELS, 1)
        fine = cell_shapes(size)[0]
        yield Case(fine, 2 * fine[1], 2)


def ours(case: Case, i: Inputs, config: ProductConfig | None = None) -> Tensor:
    return conv3(i.x, i.weight, case.stride, relu=True, config=config)[0]


def convolution(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.relu(), weight, stride=case.stride, padding=1)


def check(case: Case, i: Inputs) -> None:
    y, statistics = conv3(i.x, i.weight, case.stride, relu=True)
    gate(str(case), y, convolution(case, i.x.double(), i.weight.double()))
    gate_statistics(str(case), statistics, y[None])


def _stock(case: Case, layout: torch.memory_format) -> Binding:
    def bind(i: Inputs) -> Call:
        x, weight = (t.contiguous(memory_format=layout) for t in (i.x, i.weight))

        def run() -> object:
            y = convolution(case, x, weight)
            return y, stock_statistics(y)

        return run

    return bind


def comparisons(part: Part) -> Iterator[Comparison]:
    for case in cases(part):
        yield Comparison(
            operation="conv3 + statistics",
            case=str(case),
            bytes=case.bytes,
            operations=18 * case.positions * case.shape[1] * case.out_channels,
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check(case, i),
            ours=lambda i, case=case: ours(case, i),
            stock={name: _stock(case, layout) for name, layout in LAYOUTS.items()},
        )


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for case in cases("dry" if tiny else "table"):
        default = default_config(case.shape[1], case.out_channels, case.dtype)
        configs = list(tiles(default))
        yield Sweep(
            operation="conv3",
            key=shape_key(case.dtype, case.shape, (case.out_channels, case.stride)),
            bytes=case.bytes,
            make=lambda case=case: make_inputs(case),
            run=lambda i, config, case=case: ours(case, i, config),
            configs=configs[:1] if tiny else configs,
        )


FAMILY = Family("dense 3x3 convolutions", comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
