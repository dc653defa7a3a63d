"""The CUDA resizing kernels: `python -m bench.kernels.native_upsample` (see command.py).

Concatenations of the fusion cell and its pooled branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part
from bench.kernels.resizing_cases import CHANNELS, Case, Inputs, comparisons
from bench.kernels.shapes import INPUTS, pyramid
from lgcnet_fast.native.upsample import concat_upsample_backward, concat_upsample_forward


def forward(case: Case, i: Inputs) -> Tensor:
    return concat_upsample_forward(i.maps, case.size)


def backward(case: Case, i: Inputs) -> list[Tensor]:
    return concat_upsample_backward(i.grad, [CHANNELS] * len(case.sizes), case.sizes)


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case(1, ((5, 5), (3, 3)), (5, 5))
        return
    full = part == "full"
    dtypes = (torch.bfloat16, torch.float32) if full else (torch.bfloat16,)
    for (size, batch), dtype in itertools.product(
        list(INPUTS.items())[: None if full else 2], dtypes
    ):
        fine, middle, _ = pyramid(size)
        yield Case(batch, (fine, middle, middle), fine, dtype=dtype)
        for bins in (1, 2, 5):
            yield Case(batch, ((bins, bins),), fine, dtype=dtype)


def all_comparisons(part: Part) -> Iterator[Comparison]:
    for case in cases(part):
        yield from comparisons(case, forward, backward)


FAMILY = Family("CUDA resizing", all_comparisons)

if __name__ == "__main__":
    main(FAMILY)
