"""The 1x1 convolution of resized maps in Triton: `python -m bench.kernels.concat_pointwise`.

The joins of the fusion cell: ReLU and product of two or three maps of 48 channels side by side,
forward, and the gradients of maps and weights. The maps of a network have the output's size; others
are resized on the way. Stock resizes and concatenates in PyTorch; `separate` is our own
concatenation and a product of PyTorch. Floors: every map and the output once forward; maps, their
gradients and that of the output once backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.keys import case_of_key
from bench.kernels.resizing_cases import CHANNELS, Case, plain, resized_gradient
from bench.kernels.shapes import INPUTS, pyramid
from bench.kernels.timing import Call, gate
from lgcnet_fast.kernels.concat_pointwise import ProductConfig, concat_pointwise, resizes
from lgcnet_fast.kernels.concat_pointwise_backward import (
    concat_pointwise_backward,
    default_config,
)
from lgcnet_fast.kernels.concat_upsample import concat_upsample_forward
from lgcnet_fast.kernels.pointwise_backward import ProductGradientsConfig
from lgcnet_fast.ops.fused_concat_pointwise import concat_pointwise_key


@dataclass(frozen=True)
class Inputs:
    maps: list[Tensor]
    weight: Tensor
    dy: Tensor


def make_inputs(case: Case) -> Inputs:
    def values(height: int, width: int) -> Tensor:
        shape = (case.batch, height, width, CHANNELS)
        return torch.randn(shape, device=DEVICE, dtype=case.dtype).movedim(-1, 1)

    weight = torch.randn(CHANNELS, case.out_channels, device=DEVICE, dtype=case.dtype)
    return Inputs([values(*size) for size in case.sizes], weight, values(*case.size))


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case(1, ((5, 5), (3, 3)), (5, 5))
        return
    for size, batch in INPUTS.items():
        fine, middle, coarse = pyramid(size)
        if part == "full" or size in ((256, 512), (769, 769)):
            yield Case(batch, (fine,) * 3, fine)
            yield Case(batch, (middle,) * 2, middle)
            yield Case(batch, (fine, middle, middle), fine)
            yield Case(batch, (middle, coarse), middle)
    fine, middle, _ = pyramid((256, 512))
    yield Case(16, (fine, middle, middle), fine, dtype=torch.float32)


def moved(case: Case, backward: bool) -> int:
    maps = sum(height * width for height, width in case.sizes)
    pixels = (2 if backward else 1) * maps + case.size[0] * case.size[1]
    return case.batch * CHANNELS * pixels * case.dtype.itemsize


def operations(case: Case) -> int:
    return 2 * case.batch * case.size[0] * case.size[1] * case.out_channels * CHANNELS


def forward(case: Case, i: Inputs, config: ProductConfig | None = None) -> Tensor:
    return concat_pointwise(i.maps, i.weight, case.size, relu=True, config=config)


def backward(case: Case, i: Inputs, config: ProductGradientsConfig | None = None) -> list[Tensor]:
    dxs, dw = concat_pointwise_backward(i.dy, i.maps, i.weight, case.size, True, config)
    return [*dxs, dw]


def reference(case: Case, maps: list[Tensor], weight: Tensor) -> Tensor:
    return F.conv2d(plain(case, maps).relu(), weight[:, :, None, None])


def check_forward(case: Case, i: Inputs) -> None:
    truth = reference(case, [x.double() for x in i.maps], i.weight.double())
    gate(str(case), forward(case, i), truth)


def check_backward(case: Case, i: Inputs) -> None:
    leaves = [leaf.double().requires_grad_() for leaf in (*i.maps, i.weight)]
    y = reference(case, leaves[:-1], leaves[-1])
    truths = torch.autograd.grad(y, leaves, i.dy.double())
    *dxs, dw = backward(case, i)
    for number, (dx, truth) in enumerate(zip(dxs, truths[:-1], strict=True)):
        gate(f"gradient {number} {case}", dx, truth, factor=2)
    # The resized values are rounded in between, as those of dv are.
    gate(f"weight gradient {case}", dw.to(case.dtype), truths[-1], factor=2)


def _stock_forward(case: Case, layout: torch.memory_format) -> Binding:
    def bind(i: Inputs) -> Call:
        maps = [x.contiguous(memory_format=layout) for x in i.maps]
        return lambda: reference(case, maps, i.weight)

    return bind


def _stock_backward(case: Case, layout: torch.memory_format) -> Binding:
    """What autograd runs behind `reference`, with the rectified concatenation kept."""

    def bind(i: Inputs) -> Call:
        rectified = plain(case, i.maps).relu().contiguous(memory_format=layout)
        weight = i.weight[:, :, None, None].contiguous(memory_format=layout)
        dy = i.dy.contiguous(memory_format=layout)

        def run() -> Any:
            options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])
            dv, dw, _ = torch.ops.aten.convolution_backward(dy, rectified, weight, None, *options)
            dv = torch.ops.aten.threshold_backward(dv, rectified, 0)
            parts = zip(dv.split(CHANNELS, dim=1), case.sizes, strict=True)
            return dw, [resized_gradient(part, size, case.size) for part, size in parts]

        return run

    return bind


def _separate(case: Case) -> Binding:
    def bind(i: Inputs) -> Call:
        def run() -> Any:
            v = concat_upsample_forward(i.maps, case.size).relu_()
            return v.movedim(1, -1).flatten(0, 2) @ i.weight.T

        return run

    return bind


def comparisons(part: Part) -> Iterator[Comparison]:
    for case in cases(part):
        stock = {name: _stock_forward(case, layout) for name, layout in LAYOUTS.items()}
        yield Comparison(
            operation="concatenation + pointwise forward",
            case=str(case),
            bytes=moved(case, backward=False),
            operations=operations(case),
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check_forward(case, i),
            ours=lambda i, case=case: forward(case, i),
            stock=stock | {"separate": _separate(case)},
        )
        yield Comparison(
            operation="concatenation + pointwise backward",
            case=str(case),
            bytes=moved(case, backward=True),
            operations=2 * operations(case),
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check_backward(case, i),
            ours=lambda i, case=case: backward(case, i),
            stock={name: _stock_backward(case, layout) for name, layout in LAYOUTS.items()},
        )


def key_of(case: Case) -> str:
    maps = [(case.batch, CHANNELS, *size) for size in case.sizes]
    return concat_pointwise_key(case.dtype, maps, case.size, CHANNELS)


def case_of(key: str) -> Case:
    def read(dtype: torch.dtype, *shapes: Any) -> Case:
        *maps, (_, *size) = shapes
        return Case(maps[0][0], tuple(shape[2:] for shape in maps), tuple(size), dtype=dtype)

    return case_of_key(key, read, key_of)


def forward_sweep(key: str) -> Sweep:
    case = case_of(key)
    return Sweep(
        operation="concat_pointwise",
        key=key_of(case),
        bytes=moved(case, backward=False),
        make=lambda: make_inputs(case),
        run=lambda i, config: forward(case, i, config),
        configs=list(tiles(case)),
    )


def backward_sweep(key: str) -> Sweep:
    case = case_of(key)
    return Sweep(
        operation="concat_pointwise_backward",
        key=key_of(case),
        bytes=moved(case, backward=True),
        make=lambda: make_inputs(case),
        run=lambda i, config: backward(case, i, config),
        configs=list(gradient_tiles(case)),
    )


def tiles(case: Case) -> Iterator[ProductConfig]:
    """Tiles worth trying; the first is the default, whose output channels all of them have."""
    maps = make_maps(case)
    channels = [CHANNELS] * len(maps)
    default = ProductConfig.default(channels, CHANNELS, resizes(maps, case.size), case.dtype)
    yield default
    for block_m, block_k, warps, stages in TILES:
        yield ProductConfig(block_m, default.block_n, block_k, warps, stages)


TILES = [(32, 16, 4, 3), (32, 32, 4, 3), (32, 64, 4, 1), (32, 64, 4, 3), (32, 64, 2, 2)]
TILES += [(16, 64, 2, 2), (16, 64, 4, 2)]
"""Positions, steps of input channels, warps, stages; see the default for why not 64 positions."""


def gradient_tiles(case: Case) -> Iterator[ProductGradientsConfig]:
    """As `tiles`, of the gradients."""
    default = default_config(make_maps(case), CHANNELS, case.size)
    yield default
    yield replace(default, stages=2)
    yield replace(default, stages=4)
    yield replace(default, programs=2 * default.programs)
    yield replace(default, programs=max(1, default.programs // 2))
    yield replace(default, warps=2)
    yield replace(default, block_c=16)
    yield replace(default, block_m=16)


def make_maps(case: Case) -> list[Tensor]:
    """Without data, for what depends on shapes only."""
    return [
        torch.empty(case.batch, CHANNELS, *size, dtype=case.dtype, device="meta")
        for size in case.sizes
    ]


FAMILY = Family(
    "1x1 convolutions of resized maps",
    comparisons,
    swept={"concat_pointwise": forward_sweep, "concat_pointwise_backward": backward_sweep},
)

if __name__ == "__main__":
    main(FAMILY)
