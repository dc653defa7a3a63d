"""Gradients of the depthwise branches of a map: `python -m bench.kernels.depthwise_branches`.

For the first stages of cells, of one edge and of both that leave an input node, and for the fusion
cell. Ours is what the backend `triton` launches: one kernel of csrc where the GPU is of sm_90 and
the extension was compiled, else Triton's two, which are an alternative too. Stock is cuDNN, branch
after branch. Floors: x and every dy read once, dx written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part
from bench.kernels.shapes import FUSION_CHANNELS, INPUTS, Shape, at_stride, cell_shapes
from bench.kernels.timing import Call, gate
from lgcnet_fast.ops.depthwise_kernels import (
    depthwise_gradients,
    depthwise_input_gradient,
    depthwise_weight_gradients,
)

OF_CELLS, OF_FUSION = (1, 2, 4, 8), (1, 2, 4, 8, 12)
"""Dilations of an edge's branches."""


@dataclass(frozen=True)
class Case:
    shape: Shape
    dilations: tuple[int, ...]
    edges: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} B{len(self.dilations)} E{self.edges} {dtype}"

    @property
    def maps(self) -> int:
        return self.edges * len(self.dilations)

    @property
    def elements(self) -> int:
        """Of a map."""
        images, channels, height, width = self.shape
        return images * channels * height * width


@dataclass(frozen=True)
class Inputs:
    dys: list[Tensor]
    """NHWC, as x."""
    x: Tensor
    windows: Tensor
    """(edges, B, 3, 3, C)."""
    dilations: tuple[int, ...]


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape
    shape = (1 + case.maps, images, height, width, channels)
    x, *dys = torch.randn(shape, device=DEVICE, dtype=case.dtype).movedim(-1, 2).unbind()
    windows = torch.randn(case.edges, len(case.dilations), 3, 3, channels, device=DEVICE)
    # Kernels round them or not, where they multiply: alike if there is nothing to round.
    return Inputs(dys, x, windows.to(case.dtype).float(), case.dilations)


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case((2, 16, 3, 5), (1, 2), 2)
        return
    for size, batch in INPUTS.items() if part == "full" else [((256, 512), 16)]:
        for shape in cell_shapes(size):
            for edges in (1, 2):
                yield Case(shape, OF_CELLS, edges)
        for stride in (4, 8, 16):
            shape = (batch, FUSION_CHANNELS, *at_stride(size, stride))
            yield Case(shape, OF_FUSION, 1)


def _no_products(i: Inputs) -> Tensor:
    return i.windows.new_empty(0)


def ours(i: Inputs) -> tuple[Tensor, Tensor]:
    launch = (i.dys, i.x, i.windows, i.dilations, 1)
    return depthwise_gradients("triton", *launch, partial(_no_products, i))[:2]


def by_triton(i: Inputs) -> tuple[Tensor, Tensor]:
    launch = (i.dys, i.x, i.windows, i.dilations, 1)
    dw, _ = depthwise_weight_gradients(*launch, partial(_no_products, i))
    return depthwise_input_gradient(*launch), dw


def check(case: Case, i: Inputs) -> None:
    found_dx, found_dw = ours(i)
    x = i.x.double()
    truth, channels = torch.zeros_like(x), x.shape[1]
    for k, dy in enumerate(i.dys):
        d = i.dilations[k % len(i.dilations)]
        window = i.windows.double().flatten(0, 1)[k].permute(2, 0, 1)[:, None]
        options = {"padding": d, "dilation": d, "groups": channels}
        truth += conv2d_input(x.shape, window, dy.double(), **options)
        dw = conv2d_weight(x.relu(), window.shape, dy.double(), **options)
        gate(f"dw {k} {case}", found_dw[k], dw[:, 0])
    gate(f"dx {case}", found_dx, truth * (x > 0))


def _convolutions(layout: torch.memory_format) -> Binding:
    def bind(i: Inputs) -> Call:
        x = i.x.relu().contiguous(memory_format=layout)
        dys = [dy.contiguous(memory_format=layout) for dy in i.dys]
        windows = i.windows.flatten(0, 1).permute(0, 3, 1, 2)[:, :, None].to(x.dtype)
        weights = [window.contiguous() for window in windows]
        backward = torch.ops.aten.convolution_backward

        def run() -> tuple[Tensor, list[Tensor]]:
            dx, dws = None, []
            for k, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
                d = [i.dilations[k % len(i.dilations)]] * 2
                geometry = ([1, 1], d, d, False, [0, 0], x.shape[1], [True, True, False])
                one, dw, _ = backward(dy, x, weight, None, *geometry)
                dx = one if dx is None else dx + one
                dws.append(dw)
            assert dx is not None
            return torch.ops.aten.threshold_backward(dx, x, 0), dws

        return run

    return bind


def _by_triton(i: Inputs) -> Call:
    return lambda: by_triton(i)


STOCK: dict[str, Binding] = {
    **{name: _convolutions(layout) for name, layout in LAYOUTS.items()},
    "Triton": _by_triton,
}


def comparisons(part: Part) -> Iterator[Comparison]:
    for case in cases(part):
        yield Comparison(
            operation="gradients of depthwise branches",
            case=str(case),
            bytes=(case.maps + 2) * case.elements * case.dtype.itemsize,
            operations=36 * case.maps * case.elements,
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check(case, i),
            ours=ours,
            stock=STOCK,
        )


FAMILY = Family("gradients of depthwise branches", comparisons)

if __name__ == "__main__":
    main(FAMILY)
