"""Gradients of 1x1 convolutions in Triton: `python -m bench.kernels.pointwise_backward`.

For the depthwise maps that leave a node, those of `sep3`'s second stage, the fusion cell's edges
and the convolutions in front of cells. Stock is both gradients as batched matrix products (`bmm`)
and as convolutions. Floors: g, x and dx of every product once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.device import DEVICE
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.depthwise_cases import branches_of_nodes
from bench.kernels.keys import case_of_key
from bench.kernels.shapes import CELLS, FUSION_CHANNELS, INPUTS, Shape, Size, at_stride, cell_shapes
from bench.kernels.timing import Call, gate
from lgcnet_fast.kernels.pointwise_backward import (
    ProductGradientsConfig,
    pointwise_backward,
    summed,
)
from lgcnet_fast.ops.tuning import shape_key

FEW = 3
"""Products of a launch that a derived network has."""


@dataclass(frozen=True)
class Case:
    shape: Shape
    """Of the maps that the products take."""
    out_channels: int
    branches: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} to {self.out_channels} B{self.branches} {dtype}"

    @property
    def positions(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]

    @property
    def bytes(self) -> int:
        channels = 2 * self.shape[1] + self.out_channels
        return self.branches * self.positions * channels * self.dtype.itemsize

    @property
    def default(self) -> ProductGradientsConfig:
        return ProductGradientsConfig.default(
            self.branches, self.positions, self.shape[1], self.out_channels, self.dtype
        )


@dataclass(frozen=True)
class Inputs:
    g: Tensor
    """(B, N, C_out, H, W), NHWC, as x."""
    x: Tensor
    weights: Tensor


def make_inputs(case: Case) -> Inputs:
    images, channels, *size = case.shape

    def stack(channels: int) -> Tensor:
        shape = (case.branches, images, *size, channels)
        return torch.randn(shape, device=DEVICE, dtype=case.dtype).movedim(-1, 2)

    weights = torch.randn(case.branches, case.out_channels, channels, device=DEVICE)
    return Inputs(stack(case.out_channels), stack(channels), weights.to(case.dtype))


def cases(size: Size | None) -> Iterator[Case]:
    """Those of an input size; a tiny one if there is none."""
    if size is None:
        yield Case((2, 4, 3, 5), 6, 2)
        return
    for depthwise in branches_of_nodes(size):
        images, channels = depthwise.shape[:2]
        fused = len(depthwise.dilations) == 5
        out_channels = FUSION_CHANNELS if fused else channels
        yield Case((images, channels, *depthwise.out_size), out_channels, depthwise.maps)
    for shape in cell_shapes(size):  # sep3's second stage
        yield Case(shape, shape[1], 1)
    for channels, stride in CELLS[1:]:  # in front of cells
        yield Case((INPUTS[size], 2 * channels, *at_stride(size, stride)), channels, 1)


def ours(i: Inputs, config: ProductGradientsConfig | None = None) -> tuple[Tensor, Tensor]:
    dx, shares = pointwise_backward(list(i.g), i.x, i.weights, config=config)
    return dx, summed(shares)


def check(case: Case, i: Inputs) -> None:
    g, x, weights = i.g.double(), i.x.double(), i.weights.double()
    dx, dw = ours(i)
    gate(f"dx {case}", dx, torch.einsum("bnohw,boc->bnchw", g, weights))
    gate(f"dw {case}", dw, torch.einsum("bnohw,bnchw->boc", g, x))


def _batched_products(i: Inputs) -> Call:
    g, x = (maps.movedim(2, -1).flatten(1, 3) for maps in (i.g, i.x))
    return lambda: (torch.bmm(g, i.weights), torch.bmm(g.mT, x))


def _convolutions(i: Inputs) -> Call:
    geometry = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])
    weights = i.weights[..., None, None]
    return lambda: [
        torch.ops.aten.convolution_backward(*one, *geometry)
        for one in zip(i.g, i.x, weights, strict=True)
    ]


STOCK: dict[str, Binding] = {"bmm": _batched_products, "convolutions": _convolutions}


def comparisons(part: Part) -> Iterator[Comparison]:
    sizes = {"dry": (None,), "full": tuple(INPUTS)}.get(part, ((256, 512),))
    for case in (case for size in sizes for case in dict.fromkeys(cases(size))):
        yield Comparison(
            operation="pointwise backward",
            case=str(case),
            bytes=case.bytes,
            operations=4 * case.branches * case.positions * case.shape[1] * case.out_channels,
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check(case, i),
            ours=ours,
            stock=STOCK,
        )


def key_of(case: Case) -> str:
    return shape_key(case.dtype, case.shape, (case.branches, case.out_channels))


def case_of(key: str) -> Case:
    def read(dtype: torch.dtype, shape: Any, products: Any) -> Case:
        branches, out_channels = products
        return Case(shape, out_channels, branches, dtype)

    return case_of_key(key, read, key_of)


def sweep(key: str) -> Sweep:
    case = case_of(key)
    return Sweep(
        operation="pointwise_backward",
        key=key_of(case),
        bytes=case.bytes,
        make=lambda: make_inputs(case),
        run=ours,
        configs=list(tiles(case)),
    )


def tiles(case: Case) -> Iterator[ProductGradientsConfig]:
    """Tiles worth trying; the first is the default."""
    default = case.default
    yield default
    yield _shared_out(default, case, 2 * default.programs)
    yield _shared_out(default, case, default.programs // 2)
    yield replace(default, stages=2)
    if case.branches <= FEW:  # more programs, for each of which there is a tile or two
        yield _shared_out(replace(default, block_m=32), case, 2 * default.programs)
    else:
        yield replace(default, stages=4)
    yield _shared_out(replace(default, block_m=128, warps=8, stages=2), case, default.programs)
    other = {32: 64, 64: 32}.get(default.block_c, default.block_c)
    programs = default.programs * other // default.block_c
    yield _shared_out(replace(default, block_c=other), case, programs)
    if case.shape[1] >= 128:
        wide = replace(default, block_c=128, warps=8, stages=2)
        yield _shared_out(wide, case, default.programs * 128 // default.block_c)


def _shared_out(tile: ProductGradientsConfig, case: Case, programs: int) -> ProductGradientsConfig:
    most = -(-case.positions // tile.block_m)
    return replace(tile, programs=min(most, max(1, programs)))


FAMILY = Family("gradients of pointwise products", comparisons, swept={"pointwise_backward": sweep})

if __name__ == "__main__":
    main(FAMILY)
