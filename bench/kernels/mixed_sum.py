"""The mixed sum against PyTorch's batch norms and against the floor of bytes.

    python -m bench.kernels.mixed_sum --out FILE [--part table|sweep|full] [--commit HASH]

Checks every case against float64 first. `table`: sum with statistics, sum alone (where producers
deliver them), backward, with the default tiles, for a node with three edges (18 branches, three
skips), an edge of a cell and one of the fusion cell. `sweep`: the best tile sizes of each kernel.
Either takes about a minute; `full` adds shapes and float32.

Floors, in maps over the copy bandwidth of the same run, of K branches and J skips: 2 K + J + 1
with statistics, K + J + 1 without, 3 K + 2 J + 2 backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import (
    alternatives_seconds,
    arguments,
    copy_bandwidth,
    gate,
    print_row,
    rotations,
    seconds_a_call,
)
from bench.results_file import provenance, write_json
from lgcnet_fast.kernels.mixed_sum import Statistics, TileConfig, batch_statistics, mixed_sum
from lgcnet_fast.kernels.mixed_sum_backward import mixed_sum_grad, mixed_sum_gradient_sums

Shape = tuple[int, int, int, int]
CELLS_256X512 = [(16, 32, 64, 128), (16, 64, 32, 64), (16, 128, 16, 32), (16, 64, 64, 128)]
OTHERS = [(16, 64, 97, 97), (16, 128, 49, 49), (16, 64, 45, 60), (1, 64, 97, 193)]
EDGE, NODE, FUSION = (6, 1), (18, 3), (10, 0)


@dataclass(frozen=True)
class Case:
    shape: Shape
    branches: int
    plain: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape} K{self.branches} J{self.plain} {dtype}"

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


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape

    def maps(count: int) -> list[Tensor]:
        shape = (images, height, width, channels)
        values = [torch.randn(shape, device="cuda", dtype=case.dtype) for _ in range(count)]
        return [value.movedim(-1, 1) for value in values]

    ys = maps(case.branches)
    z, plain_z = (torch.rand(count, device="cuda") for count in (case.branches, case.plain))
    return Inputs(ys, maps(case.plain), *maps(1), z, plain_z, batch_statistics(ys))


def cases(full: bool) -> Iterator[Case]:
    if full:
        dtypes = (torch.bfloat16, torch.float32)
        for shape, counts, dtype in itertools.product(CELLS_256X512 + OTHERS, (EDGE, NODE), dtypes):
            yield Case(shape, *counts, dtype)
        for size, dtype in itertools.product(((64, 128), (32, 64), (16, 32)), dtypes):
            yield Case((16, 48, *size), *FUSION, dtype)
        return
    for shape in CELLS_256X512:
        yield Case(shape, *NODE)
    yield Case(CELLS_256X512[1], *EDGE)
    yield Case(CELLS_256X512[1], *EDGE, torch.float32)
    yield Case((16, 48, 64, 128), *FUSION)


def reference(i: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of ys, xs, z in float64."""
    ys, xs = ([m.double().requires_grad_() for m in maps] for maps in (i.ys, i.xs))
    z = i.z.double().requires_grad_()
    out = stock_sum(ys, xs, z, i.plain_z.double())
    return out.detach(), list(torch.autograd.grad(out, [*ys, *xs, z], i.g.double()))


def stock_sum(ys: list[Tensor], xs: list[Tensor], z: Tensor, plain_z: Tensor) -> Tensor:
    out = z[0] * F.batch_norm(ys[0], None, None, training=True)
    for k, y in enumerate(ys[1:], 1):
        out = out + z[k] * F.batch_norm(y, None, None, training=True)
    for j, x in enumerate(xs):
        out = out + plain_z[j] * x
    return out


def with_statistics(i: Inputs) -> Tensor:
    return mixed_sum(i.ys, i.z, batch_statistics(i.ys), i.xs, i.plain_z)


def sum_alone(i: Inputs) -> Tensor:
    return mixed_sum(i.ys, i.z, i.statistics, i.xs, i.plain_z)


def backward(i: Inputs) -> tuple[list[Tensor], Tensor]:
    sums = mixed_sum_gradient_sums(i.g, i.ys, i.statistics, i.xs)
    dys, dxs = mixed_sum_grad(i.g, i.ys, i.z, i.statistics, sums, i.plain_z)
    return [*dys, *dxs], sums.normalised.sum(1)


def check(case: Case) -> None:
    i = make_inputs(case)
    out, gradients = reference(i)
    gate(f"sum {case}", with_statistics(i), out)
    maps, dz = backward(i)
    for number, (ours, truth) in enumerate(zip(maps, gradients[:-1], strict=True)):
        gate(f"gradient {number} {case}", ours, truth)
    # The terms of dz cancel: compare with their size, not with their sum.
    terms = torch.stack([m.double().abs().mean() for m in i.ys]).mean() * i.g.numel() ** 0.5
    if (dz - gradients[-1]).abs().max() > 1e-2 * terms:
        raise SystemExit(f"WRONG RESULT: dz {case}")


def stock_call(i: Inputs, layout: torch.memory_format, gradients: bool) -> Callable[[], Any]:
    """The sum in PyTorch, with its gradients if asked for: both, since they share a capture."""
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


def stock_times(sets: list[Inputs]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds forward and backward for each layout."""
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    forward, both = (
        alternatives_seconds(
            {name: [stock_call(i, layout, grad) for i in sets] for name, layout in layouts.items()}
        )
        for grad in (False, True)
    )
    return forward, {name: both[name] - forward[name] for name in both}


def measure(case: Case, bandwidth: float) -> Iterator[dict[str, Any]]:
    k, j = case.branches, case.plain
    sets = [make_inputs(case) for _ in range(rotations((k + j + 1) * case.map_bytes))]
    stock_forward, stock_backward = stock_times(sets)
    parts: list[tuple[str, Callable[[Inputs], Any], dict[str, float], int]] = [
        ("statistics + sum", with_statistics, stock_forward, 2 * k + j + 1),
        ("sum alone", sum_alone, stock_forward, k + j + 1),
        ("backward", backward, stock_backward, 3 * k + 2 * j + 2),
    ]
    for name, ours, stock, maps in parts:
        seconds = seconds_a_call([lambda i=i, f=ours: f(i) for i in sets])
        yield {
            "case": f"{name} {case}",
            "floor_us": maps * case.map_bytes / bandwidth * 1e6,
            "ours_us": seconds * 1e6,
            "stock_us": min(stock.values()) * 1e6,
            "stock": min(stock, key=stock.__getitem__),
            "bytes": maps * case.map_bytes,
        }


def sweep(case: Case, bandwidth: float) -> Iterator[dict[str, Any]]:
    k, j = case.branches, case.plain
    sets = [make_inputs(case) for _ in range(rotations((k + j + 1) * case.map_bytes))]
    sums = mixed_sum_gradient_sums(sets[0].g, sets[0].ys, sets[0].statistics, sets[0].xs)
    kernels: dict[str, tuple[Callable[[Inputs, TileConfig], Any], int]] = {
        "statistics": (lambda i, c: batch_statistics(i.ys, config=c), k),
        "sum": (lambda i, c: mixed_sum(i.ys, i.z, i.statistics, i.xs, i.plain_z, c), k + j + 1),
        "gradient sums": (
            lambda i, c: mixed_sum_gradient_sums(i.g, i.ys, i.statistics, i.xs, c),
            k + j + 1,
        ),
        "gradients": (
            lambda i, c: mixed_sum_grad(i.g, i.ys, i.z, i.statistics, sums, i.plain_z, config=c),
            2 * k + j + 1,
        ),
    }
    tiles = [(16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 64, 8), (64, 32, 4), (256, 32, 8)]
    for name, (kernel, maps) in kernels.items():
        rows = []
        for config in itertools.starmap(TileConfig, [*tiles, (512, 32, 8)]):
            calls = [lambda i=i, f=kernel, c=config: f(i, c) for i in sets]
            rows.append({"config": str(config), "us": seconds_a_call(calls, 5) * 1e6})
        rows.sort(key=lambda row: row["us"])
        print(f"{name:<14} {case}: floor {maps * case.map_bytes / bandwidth * 1e6:.1f}")
        for row in rows[:3]:
            print(f"    {row['us']:7.1f} {row['config']}", flush=True)
        yield {"kernel": name, "case": str(case), "tiles": rows}


def table(full: bool, bandwidth: float) -> list[dict[str, Any]]:
    chosen = list(cases(full))
    for case in chosen:
        check(case)
    print(f"{len(chosen)} cases right")
    rows = []
    for case in chosen:
        for row in measure(case, bandwidth):
            rows.append(row)
            print_row(row)
    return rows


def main() -> None:
    options = arguments("mixed sum kernels")
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    if options.part == "sweep":
        shapes = [CELLS_256X512[3], *CELLS_256X512[1:3]]
        rows = [row for shape in shapes for row in sweep(Case(shape, *EDGE), bandwidth)]
        numbers = {"sweep": rows}
    else:
        numbers = {"table": table(options.part == "full", bandwidth)}
    origin = provenance(options.commit)
    write_json(options.out, origin | {"copy_bandwidth": bandwidth} | numbers)


if __name__ == "__main__":
    main()
