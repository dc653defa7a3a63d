"""1x1 convolutions with batch statistics in Triton: `python -m bench.kernels.pointwise`.

For the depthwise maps that leave an input of a cell (two edges, four branches each), those of the
second half of `sep3`, the fusion cell's edges and the single products in front of cells.

Stock is ReLU, product and statistics, in PyTorch's convolutions, and as one batched matrix product
with the statistics of mixed_sum.py (`bmm`). Floors: x and y of every branch once.
"""

from __future__ import annotations

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
from lgcnet_fast.kernels.mixed_sum import batch_statistics
from lgcnet_fast.kernels.pointwise import ProductConfig, pointwise
from lgcnet_fast.ops.tuning import shape_key


@dataclass(frozen=True)
class Case:
    shape: Shape
    out_channels: int
    branches: int
    relu: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        relu = " relu" if self.relu else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} to {self.out_channels} B{self.branches}{relu} {dtype}"

    @property
    def positions(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]

    @property
    def bytes(self) -> int:
        channels = self.shape[1] + self.out_channels
        return self.branches * self.positions * channels * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    maps: Tensor
    """(B, N, C, H, W), NHWC."""
    weights: Tensor


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape
    shape = (case.branches, images, height, width, channels)
    maps = torch.randn(shape, device=DEVICE, dtype=case.dtype).movedim(-1, 2)
    weights = torch.randn(case.branches, case.out_channels, channels, device=DEVICE)
    # Of the maps' dtype, as autocast hands them over.
    return Inputs(maps, weights.to(case.dtype))


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case((2, 4, 3, 5), 6, 2)
        return
    for size, batch in INPUTS.items():
        if part != "full" and size not in ((256, 512), (769, 769)):
            continue
        for shape in cell_shapes(size):
            yield Case(shape, shape[1], 8)
            if part == "full":
                yield Case(shape, shape[1], 2)
        yield Case((batch, FUSION_CHANNELS, *at_stride(size, 4)), FUSION_CHANNELS, 5)
        fine, middle, _ = cell_shapes(size)
        yield Case((batch, 3 * fine[1], *fine[2:]), fine[1], 1, relu=True)
        yield Case((batch, 6 * middle[1], *middle[2:]), middle[1], 1, relu=True)
    shape = cell_shapes((256, 512))[1]
    yield Case(shape, shape[1], 8, dtype=torch.float32)


def ours(case: Case, i: Inputs, config: ProductConfig | None = None) -> Tensor:
    return pointwise(i.maps, i.weights, case.relu, config=config)[0]


def check(case: Case, i: Inputs) -> None:
    y, statistics = pointwise(i.maps, i.weights, case.relu)
    x = i.maps.double()
    truth = torch.einsum("boc,bnchw->bnohw", i.weights.double(), x.relu() if case.relu else x)
    gate(str(case), y, truth)
    gate_statistics(str(case), statistics, y)


def _convolutions(case: Case, layout: torch.memory_format) -> Binding:
    def bind(i: Inputs) -> Call:
        maps = [x.contiguous(memory_format=layout) for x in i.maps]
        weights = [w[:, :, None, None].contiguous(memory_format=layout) for w in i.weights]

        def run() -> list[object]:
            results: list[object] = []
            for x, weight in zip(maps, weights, strict=True):
                y = F.conv2d(x.relu() if case.relu else x, weight)
                results += [y, stock_statistics(y)]
            return results

        return run

    return bind


def _batched_product(case: Case) -> Binding:
    def bind(i: Inputs) -> Call:
        matrices = i.maps.movedim(2, -1).flatten(1, 3)
        shape = (case.branches, case.shape[0], *case.shape[2:], case.out_channels)

        def run() -> object:
            x = matrices.relu() if case.relu else matrices
            y = torch.bmm(x, i.weights.transpose(1, 2)).view(shape).movedim(-1, 2)
            return y, batch_statistics(list(y))

        return run

    return bind


def comparisons(part: Part) -> Iterator[Comparison]:
    for case in cases(part):
        stock = {name: _convolutions(case, layout) for name, layout in LAYOUTS.items()}
        yield Comparison(
            operation="pointwise + statistics",
            case=str(case),
            bytes=case.bytes,
            operations=2 * case.branches * case.positions * case.shape[1] * case.out_channels,
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check(case, i),
            ours=lambda i, case=case: ours(case, i),
            stock=stock | {"bmm": _batched_product(case)},
        )


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for case in cases("dry" if tiny else "table"):
        configs = list(tiles(ProductConfig.default(case.shape[1], case.out_channels)))
        yield Sweep(
            operation="pointwise",
            key=shape_key(case.dtype, case.shape, (case.branches, case.out_channels)),
            bytes=case.bytes,
            make=lambda case=case: make_inputs(case),
            run=lambda i, config, case=case: ours(case, i, config),
            configs=configs[:1] if tiny else configs,
        )


FAMILY = Family("pointwise products", comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
