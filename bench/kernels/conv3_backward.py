"""Weight gradients of dense 3x3 convolutions: `python -m bench.kernels.conv3_backward`.

For the edges of cells: those that leave both inputs of a cell, four in a call, or another node.
Stock is cuDNN's gradients of one weight after the other. Floors: g and x of every convolution once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.device import DEVICE
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.shapes import INPUTS, Shape, Size, cell_shapes
from bench.kernels.timing import Call, gate
from lgcnet_fast.kernels.conv3_backward import WeightGradConfig, conv3_weight_grad, summed
from lgcnet_fast.ops.tuning import shape_key


@dataclass(frozen=True)
class Case:
    shape: Shape
    branches: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape} B{self.branches} {str(self.dtype).removeprefix('torch.')}"

    @property
    def elements(self) -> int:
        return self.branches * torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return 2 * self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    gs: list[Tensor]
    """NHWC, as xs."""
    xs: list[Tensor]


def make_inputs(case: Case) -> Inputs:
    images, channels, *size = case.shape

    def maps() -> list[Tensor]:
        shape = (case.branches, images, *size, channels)
        stack = torch.randn(shape, device=DEVICE, dtype=case.dtype)
        return list(stack.movedim(-1, 2).unbind())

    return Inputs(maps(), maps())


def cases(size: Size | None) -> Iterator[Case]:
    """Those of an input size; a tiny one if there is none."""
    if size is None:
        yield Case((2, 32, 3, 5), 2)
        return
    for shape in cell_shapes(size):
        yield Case(shape, 4)
        yield Case(shape, 1)


def ours(i: Inputs, config: WeightGradConfig | None = None) -> Tensor:
    return summed(conv3_weight_grad(i.gs, i.xs, config))


def check(case: Case, i: Inputs) -> None:
    channels = case.shape[1]
    for g, x, dw in zip(i.gs, i.xs, ours(i), strict=True):
        shape = (channels, channels, 3, 3)
        truth = torch.nn.grad.conv2d_weight(x.double(), shape, g.double(), padding=1)
        gate(f"dw {case}", dw, truth)


def _convolutions(i: Inputs) -> Call:
    channels = i.xs[0].shape[1]
    weight = i.xs[0].new_empty(channels, 3, 3, channels).movedim(-1, 1)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    backward = torch.ops.aten.convolution_backward
    return lambda: [
        backward(g, x, weight, None, *geometry)[1] for g, x in zip(i.gs, i.xs, strict=True)
    ]


STOCK: dict[str, Binding] = {"convolutions": _convolutions}


def comparisons(part: Part) -> Iterator[Comparison]:
    sizes = {"dry": [None], "full": list(INPUTS)}.get(part, [(256, 512), (769, 769)])
    for case in (case for size in sizes for case in cases(size)):
        yield Comparison(
            operation="3x3 weight gradient",
            case=str(case),
            bytes=case.bytes,
            operations=18 * case.elements * case.shape[1],
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check(case, i),
            ours=ours,
            stock=STOCK,
        )


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for size in (None,) if tiny else INPUTS:
        for case in cases(size):
            found = list(tiles(case))
            yield Sweep(
                operation="conv3_weight_grad",
                key=shape_key(case.dtype, case.shape, (case.branches, case.shape[1])),
                bytes=case.bytes,
                make=lambda case=case: make_inputs(case),
                run=ours,
                configs=found if size else found[:1],
                input=size,
                stock=STOCK,
            )


def tiles(case: Case) -> Iterator[WeightGradConfig]:
    """Tiles worth trying; the first is the default."""

    def tile(block_p: int, block_o: int, block_c: int, a_core: int) -> WeightGradConfig:
        return WeightGradConfig.of_tile(
            case.branches, case.shape, case.shape[1],
            block_p, block_o, block_c, resident=132 * a_core,
        )  # fmt: skip

    default = WeightGradConfig.default(case.branches, case.shape, case.shape[1])
    yield default
    yield replace(default, warps=4)
    yield tile(32, 32, 32, 1)
    yield tile(32, 32, 32, 4)
    yield tile(64, 32, 32, 1)
    if case.shape[1] >= 64:
        yield tile(32, 32, 64, 1)
        yield tile(32, 64, 32, 1)
        yield tile(64, 32, 64, 1)


FAMILY = Family("weight gradients of 3x3 convolutions", comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
