"""The CUDA kernels of the mixed sum: `python -m bench.kernels.native_mixed_sum` (see command.py).

Cases and floors are those of mixed_sum.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.device import DEVICE
from bench.kernels import mixed_sum as twin
from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part
from bench.kernels.mixed_sum import Case, stock_sum
from bench.kernels.timing import gate
from lgcnet_fast.native.mixed_sum import Statistics, batch_statistics, mixed_sum
from lgcnet_fast.native.mixed_sum_backward import mixed_sum_grad, mixed_sum_gradient_sums


@dataclass(frozen=True)
class Inputs:
    ys: list[Tensor]
    xs: list[Tensor]
    g: Tensor
    z: Tensor
    plain_z: Tensor
    statistics: Statistics


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape

    def maps(count: int) -> list[Tensor]:
        shape = (images, height, width, channels)
        values = [torch.randn(shape, device=DEVICE, dtype=case.dtype) for _ in range(count)]
        return [value.movedim(-1, 1) for value in values]

    ys, xs, (g,) = maps(case.branches), maps(case.plain), maps(1)
    z, plain_z = (torch.rand(count, device=DEVICE) for count in (case.branches, case.plain))
    return Inputs(ys, xs, g, z, plain_z, batch_statistics(ys))


def with_statistics(i: Inputs) -> Tensor:
    return mixed_sum(i.ys, i.z, batch_statistics(i.ys), i.xs, i.plain_z)


def sum_alone(i: Inputs) -> Tensor:
    return mixed_sum(i.ys, i.z, i.statistics, i.xs, i.plain_z)


def backward(i: Inputs) -> tuple[list[Tensor], Tensor]:
    sums = mixed_sum_gradient_sums(i.g, i.ys, i.statistics, i.xs)
    dys, dxs = mixed_sum_grad(i.g, i.ys, i.z, i.statistics, sums, i.plain_z)
    return [*dys, *dxs], sums.normalised.sum(1)


def check_forward(i: Inputs) -> None:
    ys, xs = ([m.double() for m in maps] for maps in (i.ys, i.xs))
    gate("mixed sum", with_statistics(i), stock_sum(ys, xs, i.z.double(), i.plain_z.double()))


def check_backward(i: Inputs) -> None:
    leaves = [m.double().requires_grad_() for m in (*i.ys, *i.xs, i.z)]
    ys, xs = leaves[: len(i.ys)], leaves[len(i.ys) : -1]
    out = stock_sum(ys, xs, leaves[-1], i.plain_z.double())
    *truths, dz_truth = torch.autograd.grad(out, leaves, i.g.double())
    maps, dz = backward(i)
    for number, (ours, truth) in enumerate(zip(maps, truths, strict=True)):
        gate(f"mixed sum gradient {number}", ours, truth)
    # The terms of dz cancel: compare with their size, not with their sum.
    terms = torch.stack([m.double().abs().mean() for m in i.ys]).mean() * i.g.numel() ** 0.5
    if not (dz - dz_truth).abs().max() <= 1e-2 * terms:
        raise SystemExit("WRONG RESULT: dz of the mixed sum")


def comparisons(part: Part) -> Iterator[Comparison]:
    parts: list[tuple[Callable[[Inputs], Any], Callable[[Inputs], None]]] = [
        (with_statistics, check_forward),
        (sum_alone, check_forward),
        (backward, check_backward),
    ]
    native = itertools.product(twin.cases(part), parts)
    for one, (case, (ours, check)) in zip(twin.comparisons(part), native, strict=True):
        yield replace(one, make=partial(make_inputs, case), check=check, ours=ours)


FAMILY = Family("CUDA mixed sum", comparisons)

if __name__ == "__main__":
    main(FAMILY)
