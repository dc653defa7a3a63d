"""The mixed sum in Triton against PyTorch's batch norms: `python -m bench.kernels.mixed_sum`.

For a node with three edges (18 branches, three skips), an edge of a cell and one of the fusion
cell: sum with statistics, sum alone (where producers deliver them), backward.

Floors, in maps, of K branches and J skips: 2 K + J + 1 with statistics, K + J + 1 without,
3 K + 2 J + 2 backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.keys import case_of_key
from bench.kernels.shapes import FUSION_CHANNELS, INPUTS, Shape, at_stride, cell_shapes
from bench.kernels.timing import Call, gate
from lgcnet_fast.kernels.mixed_sum import Statistics, TileConfig, batch_statistics, mixed_sum
from lgcnet_fast.kernels.mixed_sum_backward import (
    GradientSums,
    mixed_sum_grad,
    mixed_sum_gradient_sums,
)
from lgcnet_fast.kernels.slabs import FEW_MAPS, SlabConfig
from lgcnet_fast.ops.fused_mixed_norm_sum import tile
from lgcnet_fast.ops.tuning import shape_key

EDGE, NODE, FUSION = (6, 1), (18, 3), (10, 0)
"""Branches and skips."""
SHAPES = [(1, 4, 4), (1, 8, 4), (2, 1, 4), (2, 2, 4), (2, 2, 8), (4, 1, 4)]
TILES = list(itertools.starmap(TileConfig, [*SHAPES, (4, 2, 4)]))
SLABS: list[dict[str, int]] = [
    {"block_c": 16},
    {"block_c": 32},
    {"loads": 8},
    {"loads": 2, "maps": 2},
    {"warps": 4, "programs": 396},
    {"warps": 4, "programs": 528},
    {"warps": 8, "programs": 264},
    {"block_c": 32, "warps": 4, "programs": 528},
]
FEW_SLABS: list[dict[str, int]] = [
    {"block_c": 32},
    {"loads": 8},
    {"maps": 2},
    {"warps": 4, "programs": 264},
    {"block_c": 32, "warps": 4, "programs": 264},
    {"warps": 4, "loads": 8, "programs": 264},
    {"warps": 4, "maps": 2, "programs": 264},
]
"""What is tried in place of the defaults of kernels that add up many maps, and one or two."""


@dataclass(frozen=True)
class Case:
    shape: Shape
    branches: int
    plain: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} K{self.branches} J{self.plain} {dtype}"

    @property
    def map_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    ys: list[Tensor]
    xs: list[Tensor]
    g: Tensor
    z: Tensor
    plain_z: Tensor
    statistics: Statistics
    sums: GradientSums
    """Of the statistics and g."""


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape

    def maps(count: int) -> list[Tensor]:
        shape = (images, height, width, channels)
        values = [torch.randn(shape, device=DEVICE, dtype=case.dtype) for _ in range(count)]
        return [value.movedim(-1, 1) for value in values]

    ys, xs, (g,) = maps(case.branches), maps(case.plain), maps(1)
    z, plain_z = (torch.rand(count, device=DEVICE) for count in (case.branches, case.plain))
    statistics = batch_statistics(ys)
    sums = mixed_sum_gradient_sums(g, ys, statistics, xs)
    return Inputs(ys, xs, g, z, plain_z, statistics, sums)


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield Case((2, 4, 3, 5), 2, 1)
        return
    for size, batch in INPUTS.items() if part == "full" else [((256, 512), 16)]:
        for shape in cell_shapes(size):
            yield Case(shape, *NODE)
        yield Case(cell_shapes(size)[1], *EDGE)
        yield Case(cell_shapes(size)[1], *EDGE, torch.float32)
        for stride in (4, 8, 16) if part == "full" else (4,):
            yield Case((batch, FUSION_CHANNELS, *at_stride(size, stride)), *FUSION)
    yield Case((16, 64, 64, 128), *NODE)


def stock_sum(ys: list[Tensor], xs: list[Tensor], z: Tensor, plain_z: Tensor) -> Tensor:
    out = z[0] * F.batch_norm(ys[0], None, None, training=True)
    for k, y in enumerate(ys[1:], 1):
        out = out + z[k] * F.batch_norm(y, None, None, training=True)
    for j, x in enumerate(xs):
        out = out + plain_z[j] * x
    return out


def tiled(launch: str, i: Inputs) -> dict[str, Any]:
    """The tile with which the operation launches a kernel."""
    return tile("triton", launch, i.ys, len(i.xs))


def with_statistics(i: Inputs) -> Tensor:
    statistics = batch_statistics(i.ys, **tiled("statistics", i))
    return mixed_sum(i.ys, i.z, statistics, i.xs, i.plain_z, **tiled("forward", i))


def sum_alone(i: Inputs) -> Tensor:
    return mixed_sum(i.ys, i.z, i.statistics, i.xs, i.plain_z, **tiled("forward", i))


def gradient_sums(i: Inputs, config: SlabConfig) -> GradientSums:
    """With the gradients of z and plain_z, as training wants them."""
    weights = torch.empty(len(i.ys) + len(i.xs), device=DEVICE)
    return mixed_sum_gradient_sums(i.g, i.ys, i.statistics, i.xs, config, weights)


def backward(i: Inputs) -> tuple[list[Tensor], Tensor]:
    sums = gradient_sums(i, **tiled("gradient_sums", i))
    tile_of_maps = tiled("gradients", i)
    dys, dxs = mixed_sum_grad(i.g, i.ys, i.z, i.statistics, sums, i.plain_z, **tile_of_maps)
    assert sums.weights is not None
    return [*dys, *dxs], sums.weights


def check_forward(i: Inputs) -> None:
    ys, xs = ([m.double() for m in maps] for maps in (i.ys, i.xs))
    gate("mixed sum", with_statistics(i), stock_sum(ys, xs, i.z.double(), i.plain_z.double()))


def check_backward(i: Inputs) -> None:
    ys, xs = ([m.double().requires_grad_() for m in maps] for maps in (i.ys, i.xs))
    z, plain_z = (weights.double().requires_grad_() for weights in (i.z, i.plain_z))
    out = stock_sum(ys, xs, z, plain_z)
    weights = [z, plain_z] if i.xs else [z]
    truths = torch.autograd.grad(out, [*ys, *xs, *weights], i.g.double())
    maps, dz = backward(i)
    dz_truth = torch.cat(truths[len(maps) :])
    for number, (ours, truth) in enumerate(zip(maps, truths, strict=False)):
        gate(f"mixed sum gradient {number}", ours, truth)
    # The terms of dz cancel: compare with their size, not with their sum.
    terms = torch.stack([m.double().abs().mean() for m in i.ys]).mean() * i.g.numel() ** 0.5
    if not (dz - dz_truth).abs().max() <= 1e-2 * terms:
        raise SystemExit("WRONG RESULT: dz of the mixed sum")


def _stock(layout: torch.memory_format, gradients: bool) -> Binding:
    """The sum in PyTorch, with its gradients if asked for: both, since they share a capture."""

    def bind(i: Inputs) -> Call:
        maps = [m.contiguous(memory_format=layout) for m in [*i.ys, *i.xs]]
        z, plain_z = i.z.to(i.g.dtype), i.plain_z.to(i.g.dtype)
        g, count = i.g.contiguous(memory_format=layout), len(i.ys)

        def run() -> Any:
            if not gradients:
                return stock_sum(maps[:count], maps[count:], z, plain_z)
            leaves = [leaf.detach().requires_grad_() for leaf in (*maps, z)]
            out = stock_sum(leaves[:count], leaves[count:-1], leaves[-1], plain_z)
            return torch.autograd.grad(out, leaves, g)

        return run

    return bind


def comparisons(part: Part) -> Iterator[Comparison]:
    forward = {name: _stock(layout, gradients=False) for name, layout in LAYOUTS.items()}
    both = {name: _stock(layout, gradients=True) for name, layout in LAYOUTS.items()}
    for case in cases(part):
        k, j = case.branches, case.plain
        parts: list[tuple[str, Callable[[Inputs], Any], Callable[[Inputs], None], int]] = [
            ("statistics + sum", with_statistics, check_forward, 2 * k + j + 1),
            ("alone", sum_alone, check_forward, k + j + 1),
            ("backward", backward, check_backward, 3 * k + 2 * j + 2),
        ]
        for name, ours, check, maps in parts:
            yield Comparison(
                operation=f"mixed sum {name}",
                case=str(case),
                bytes=maps * case.map_bytes,
                operations=2 * maps * case.map_bytes // case.dtype.itemsize,
                make=lambda case=case: make_inputs(case),
                check=check,
                ours=ours,
                stock=both if name == "backward" else forward,
                stock_excess=forward if name == "backward" else {},
            )


def key_of(case: Case) -> str:
    return shape_key(case.dtype, case.shape, (case.branches, case.plain))


def case_of(key: str) -> Case:
    def read(dtype: torch.dtype, shape: Any, maps: Any) -> Case:
        branches, plain = maps
        return Case(shape, branches, plain, dtype)

    return case_of_key(key, read, key_of)


RUNS: dict[str, Callable[[Inputs, Any], Any]] = {
    "mixed_sum_statistics": lambda i, config: batch_statistics(i.ys, config=config),
    "mixed_sum_forward": lambda i, config: mixed_sum(
        i.ys, i.z, i.statistics, i.xs, i.plain_z, config
    ),
    "mixed_sum_gradient_sums": gradient_sums,
    "mixed_sum_gradients": lambda i, config: mixed_sum_grad(
        i.g, i.ys, i.z, i.statistics, i.sums, i.plain_z, config=config
    ),
}
"""By operation of the tuning table."""


def sweep(operation: str, key: str) -> Sweep:
    case = case_of(key)
    k, j, channels = case.branches, case.plain, case.shape[1]
    streaming, writing = (
        [TileConfig.streaming(prod(case.shape), gradients), *TILES] for gradients in (False, True)
    )
    # Statistics share no map, so that `maps` says nothing.
    alone = _slabs(channels, k)
    alone = [config for config in alone if config.maps == alone[0].maps]
    maps, configs = {
        "mixed_sum_statistics": (k, alone),
        "mixed_sum_forward": (k + j + 1, streaming),
        "mixed_sum_gradient_sums": (k + j + 1, _slabs(channels, k + j, gradients=True)),
        "mixed_sum_gradients": (2 * k + j + 1, writing),
    }[operation]
    return Sweep(
        operation=operation,
        key=key_of(case),
        bytes=maps * case.map_bytes,
        make=lambda: make_inputs(case),
        run=RUNS[operation],
        configs=configs,
    )


def _slabs(channels: int, maps: int, gradients: bool = False) -> list[Any]:
    """The default for so many maps, and what else is tried."""
    default = TileConfig.reducing(channels, maps, gradients)
    tried = FEW_SLABS if maps <= FEW_MAPS else SLABS
    return [default, *(replace(default, **changes) for changes in tried)]


FAMILY = Family("mixed sum", comparisons, swept={name: partial(sweep, name) for name in RUNS})

if __name__ == "__main__":
    main(FAMILY)
