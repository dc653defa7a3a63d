"""Concatenation and sum of resized maps in Triton: `python -m bench.kernels.concat_upsample`.

Floors: every map once and the output once, forward and backward alike. PyTorch gets the gradient
of a copied map for nothing, as a view of the output's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.device import DEVICE
from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part, Sweep
from bench.kernels.keys import case_of_key
from bench.kernels.resizing_cases import CHANNELS, Case, Inputs, comparisons, make_inputs
from bench.kernels.shapes import INPUTS, pyramid
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
from lgcnet_fast.ops.tuning import tuned


def tile(case: Case, backwards: bool) -> StripConfig:
    """That with which the operation launches the kernel."""
    if backwards and case.add:  # Maps that are copied have no part in it.
        case = replace(case, sizes=case.resized)
    operation = f"{'sum' if case.add else 'concat'}_upsample{'_backward' if backwards else ''}"
    return tuned(BACKWARD if backwards else FORWARD, operation, key_of(case), DEVICE)


def forward(case: Case, i: Inputs, config: StripConfig | None = None) -> Tensor:
    config = config or tile(case, backwards=False)
    function = sum_upsample_forward if case.add else concat_upsample_forward
    return function(i.maps, case.size, config=config)


def backward(case: Case, i: Inputs, config: StripConfig | None = None) -> list[Tensor]:
    config = config or tile(case, backwards=True)
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


def key_of(case: Case) -> str:
    maps = [(case.batch, CHANNELS, *size) for size in case.sizes]
    return resize_key(case.dtype, maps, case.size)


def case_of(key: str, add: bool) -> Case:
    """add: whether it is that of a sum; that of a sum's gradient lacks maps that are copied."""

    def read(dtype: torch.dtype, *shapes: Any) -> Case:
        *maps, size = shapes
        return Case(maps[0][0], tuple(shape[2:] for shape in maps), size, add, dtype)

    return case_of_key(key, read, key_of)


def sweep(operation: str, key: str) -> Sweep:
    case = case_of(key, add=operation.startswith("sum"))
    backwards = operation.endswith("_backward")
    kernel: Any = backward if backwards else forward
    return Sweep(
        operation=operation,
        key=key_of(case),
        bytes=case.bytes(backwards),
        make=lambda: make_inputs(case),
        run=lambda i, config: kernel(case, i, config),
        configs=[BACKWARD if backwards else FORWARD, *TILES],
    )


TILES = [
    *(StripConfig(512, rows, 2) for rows in (1, 2)),
    *(StripConfig(1024, rows, 4) for rows in (1, 2, 4, 5, 8)),
    StripConfig(2048, 4, 8),
]
"""Worth trying; the defaults are among them."""
OPERATIONS = [
    f"{kind}_upsample{suffix}" for kind in ("concat", "sum") for suffix in ("", "_backward")
]
FAMILY = Family(
    "concatenation and sum of resized maps",
    all_comparisons,
    swept={name: partial(sweep, name) for name in OPERATIONS},
)

if __name__ == "__main__":
    main(FAMILY)
