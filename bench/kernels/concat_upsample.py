"""Concatenation and sum of resized maps in Triton: `python -m bench.kernels.concat_upsample`.

Floors: every map once and the output once, forward and backward alike. PyTorch gets the gradient
of a copied map for nothing, as a view of the output's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part, Sweep
from bench.kernels.resizing_cases import CHANNELS, Case, Inputs, comparisons, make_inputs
from bench.kernels.shapes import INPUTS, Size, pyramid
from lgcnet_fast.kernels.concat_upsample import (
    FORWARD,
    concat_upsample_forward,
    sum_upsample_forward,
)
from lgcnet_fast.kernels.concat_upsample_backward import (
    BACKWARD,
    concat_upsample_backward,
    sum_upsample_backward,
)
from lgcnet_fast.kernels.rows import StripConfig
from lgcnet_fast.ops.fused_resize import resize_key


def forward(case: Case, i: Inputs, config: StripConfig = FORWARD) -> Tensor:
    function = sum_upsample_forward if case.add else concat_upsample_forward
    return function(i.maps, case.size, config=config)


def backward(case: Case, i: Inputs, config: StripConfig = BACKWARD) -> list[Tensor]:
    if case.add:
        return sum_upsample_backward(i.grad, case.resized, config=config)
    channels = [CHANNELS] * len(case.sizes)
    return concat_upsample_backward(i.grad, channels, case.sizes, config=config)


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        for add in (False, True):
            yield Case(1, ((5, 5), (3, 3)), (5, 5), add)
        return
    for size, batch in INPUTS.items():
        fine, middle, coarse = pyramid(size)
        yield Case(batch, (fine, middle, middle), fine)
        yield Case(batch, (fine, middle, middle), fine, add=True)
        yield Case(batch, (fine, fine, fine), fine)  # as a search's fusion cell has it
        if part == "full" or size == (256, 512):
            yield Case(batch, (middle, coarse), middle)
            yield Case(batch, (fine, coarse), fine, add=True)
        if part == "full" or size == (769, 769):
            yield Case(batch, (fine, middle, middle), fine, dtype=torch.float32)


def all_comparisons(part: Part) -> Iterator[Comparison]:
    for case in cases(part):
        yield from comparisons(case, forward, backward)


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for size in (None,) if tiny else INPUTS:
        yield from _sweeps(size)


def _sweeps(size: Size | None) -> Iterator[Sweep]:
    kernels: dict[Any, tuple[str, StripConfig]] = {
        forward: ("", FORWARD),
        backward: ("_backward", BACKWARD),
    }
    tiles = [(512, 2), (1024, 4), (2048, 4), (2048, 8)]
    for case, (kernel, (suffix, default)) in itertools.product(_swept(size), kernels.items()):
        configs = [default] + [
            StripConfig(block, rows, warps)
            for (block, warps), rows in itertools.product(tiles, (1, 2, 4, 8))
        ]
        sizes = case.resized if kernel is backward else case.sizes
        if not sizes:  # every map of the sum has the output's gradient
            continue
        yield Sweep(
            operation=f"{'sum' if case.add else 'concat'}_upsample{suffix}",
            key=resize_key(case.dtype, [(case.batch, CHANNELS, *s) for s in sizes], case.size),
            bytes=case.bytes(backward=kernel is backward),
            make=lambda case=case: make_inputs(case),
            run=lambda i, config, case=case, kernel=kernel: kernel(case, i, config),
            configs=configs if size else configs[:1],
            input=size,
        )


def _swept(size: Size | None) -> Iterator[Case]:
    """The fusion cell's concatenations, upsampling edges and final sum."""
    if size is None:
        yield from cases("dry")
        return
    batch, (fine, middle, coarse) = INPUTS[size], pyramid(size)
    yield Case(batch, (fine, fine, fine), fine)
    yield Case(batch, (middle, middle), middle)
    yield Case(batch, (middle,), fine)
    yield Case(batch, (coarse,), middle)
    for level in (fine, middle, coarse):  # pooled maps
        yield from (Case(batch, ((bins, bins),), level) for bins in (1, 2, 5))
    yield Case(batch, (fine, fine, fine), fine, add=True)


FAMILY = Family("concatenation and sum of resized maps", all_comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
