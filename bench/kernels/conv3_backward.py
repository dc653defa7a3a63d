"""Weight gradients of dense 3x3 convolutions: `python -m bench.kernels.conv3_backward`.

For the edges of cells: those that leave both inputs of a cell, four in a call, or another node. And
for those of the fusion cell. Ours is what the backend `triton` launches: one kernel of csrc where
the GPU is of sm_90 and the extension was compiled, else Triton's, which is an alternative too, by
default tiles. Stock is cuDNN's gradients of one weight after the other. Floors: g and x of every
convolution once.
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
from lgcnet_fast.kernels.conv3_backward import WeightGradConfig, conv3_weight_grad, summed
from lgcnet_fast.ops.conv3_kernels import conv3_weight_gradients
from lgcnet_fast.ops.tuning import shape_key


@dataclass(frozen=True)
class Case:
    shape: Shape
    branches: int
    out_channels: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape} B{self.branches} {str(self.dtype).removeprefix('torch.')}"

    @property
    def positions(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]

    @property
    def bytes(self) -> int:
        channels = self.shape[1] + self.out_channels
        return self.branches * self.positions * channels * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    gs: list[Tensor]
    """NHWC, as xs."""
    xs: list[Tensor]
    weights: list[Tensor]
    """(C_out, C, 3, 3), channels_last; their values do not count."""


def make_inputs(case: Case) -> Inputs:
    images, in_channels, *size = case.shape

    def maps(channels: int) -> list[Tensor]:
        shape = (case.branches, images, *size, channels)
        stack = torch.randn(shape, device=DEVICE, dtype=case.dtype)
        return list(stack.movedim(-1, 2).unbind())

    weight = torch.zeros(case.out_channels, 3, 3, in_channels, device=DEVICE, dtype=case.dtype)
    weights = [weight.movedim(-1, 1)] * case.branches
    return Inputs(maps(case.out_channels), maps(in_channels), weights)


def cases(size: Size | None) -> Iterator[Case]:
    """Those of an input size; a tiny one if there is none."""
    if size is None:
        yield Case((2, 32, 3, 5), 2, 32)
        return
    for shape in cell_shapes(size):
        yield Case(shape, 4, shape[1])
        yield Case(shape, 1, shape[1])
    for shape in fusion_shapes(size):
        yield Case(shape, 1, FUSION_CHANNELS)


def ours(i: Inputs) -> Tensor:
    return conv3_weight_gradients(i.gs, i.xs, i.weights, "triton")


def by_triton(i: Inputs, config: WeightGradConfig | None = None) -> Tensor:
    return summed(conv3_weight_grad(i.gs, i.xs, config=config), i.xs[0].dtype)


def check(case: Case, i: Inputs) -> None:
    shape = (case.out_channels, case.shape[1], 3, 3)
    for g, x, dw in zip(i.gs, i.xs, ours(i), strict=True):
        truth = torch.nn.grad.conv2d_weight(x.double(), shape, g.double(), padding=1)
        gate(f"dw {case}", dw, truth)


def _convolutions(i: Inputs) -> Call:
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    backward = torch.ops.aten.convolution_backward
    return lambda: [
        backward(*one, None, *geometry)[1] for one in zip(i.gs, i.xs, i.weights, strict=True)
    ]


def _by_triton(i: Inputs) -> Call:
    return lambda: by_triton(i)


STOCK: dict[str, Binding] = {"convolutions": _convolutions, "Triton": _by_triton}


def comparisons(part: Part) -> Iterator[Comparison]:
    sizes = {"dry": [None], "full": list(INPUTS)}.get(part, [(256, 512), (769, 769)])
    for case in (case for size in sizes for case in cases(size)):
        yield Comparison(
            operation="3x3 weight gradient",
            case=str(case),
            bytes=case.bytes,
            operations=18 * case.branches * case.positions * case.shape[1] * case.out_channels,
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check(case, i),
            ours=ours,
            stock=STOCK,
        )


def key_of(case: Case) -> str:
    return shape_key(case.dtype, case.shape, (case.branches, case.out_channels))


def case_of(key: str) -> Case:
    def read(dtype: torch.dtype, shape: Any, convolutions: Any) -> Case:
        branches, out_channels = convolutions
        return Case(shape, branches, out_channels, dtype)

    return case_of_key(key, read, key_of)


def sweep(key: str) -> Sweep:
    case = case_of(key)
    return Sweep(
        operation="conv3_weight_grad",
        key=key_of(case),
        bytes=case.bytes,
        make=lambda: make_inputs(case),
        run=by_triton,
        configs=list(tiles(case)),
        stock={"convolutions": _convolutions},
    )


def tiles(case: Case) -> Iterator[WeightGradConfig]:
    """Tiles worth trying; the first is the default."""

    def tile(block_o: int, block_c: int, warps: int, a_core: int) -> WeightGradConfig:
        return WeightGradConfig.of_tile(
            case.branches, case.shape, case.out_channels,
            32, block_o, block_c, warps, resident=132 * a_core,
        )  # fmt: skip

    default = WeightGradConfig.default(case.branches, case.shape, case.out_channels)
    yield default
    yield replace(default, stages=4)
    yield tile(32, 64, 4, 2)
    if min(case.shape[1], case.out_channels) < 64:
        yield tile(64, 32, 4, 2)
    if case.shape[1] >= 64:
        yield tile(32, 32, 4, 2)
        yield tile(64, 64, 8, 1)


FAMILY = Family(
    "weight gradients of 3x3 convolutions", comparisons, swept={"conv3_weight_grad": sweep}
)

if __name__ == "__main__":
    main(FAMILY)
