"""Concatenation and sum of resized maps against PyTorch and against the floor of bytes.

    python -m bench.kernels.concat_upsample --out FILE [--part table|sweep|full] [--commit HASH]

Checks every case against float64 first. `table`: the concatenations and sums of the fusion cell,
forward and backward, with the default tiles. `sweep`: the best tile sizes on a few of them. Either
takes about a minute; `full` adds float32 and the smaller maps.

Floors, over the copy bandwidth of the same run: every map once and the output once, forward and
backward alike. Stock gets the gradient of a copied map for nothing, as a view of the output's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import (
    Call,
    alternatives_seconds,
    arguments,
    copy_bandwidth,
    gate,
    print_row,
    rotations,
    seconds_a_call,
)
from bench.results_file import provenance, write_json
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

Size = tuple[int, int]
CHANNELS = 48
PYRAMIDS: dict[str, tuple[int, tuple[Size, Size, Size]]] = {
    "256x512": (16, ((64, 128), (32, 64), (16, 32))),
    "769x769": (16, ((193, 193), (97, 97), (49, 49))),
    "360x480": (16, ((90, 120), (45, 60), (23, 30))),
    "769x1537": (1, ((193, 385), (97, 193), (49, 97))),
}
"""Input -> batch, sizes at strides 4, 8 and 16."""


@dataclass(frozen=True)
class Case:
    """Maps of 48 channels, each resized to the first one's size."""

    input: str
    batch: int
    sizes: tuple[Size, ...]
    add: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        sizes = "+".join(f"{height}x{width}" for height, width in self.sizes)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{'sum' if self.add else 'concat'} {self.batch}x{CHANNELS}x[{sizes}] {dtype}"

    @property
    def out_channels(self) -> int:
        return CHANNELS if self.add else CHANNELS * len(self.sizes)

    @property
    def resized(self) -> tuple[Size, ...]:
        """Sizes of the maps that have a gradient of their own."""
        return self.sizes[1:] if self.add else self.sizes

    def bytes(self, sizes: tuple[Size, ...]) -> int:
        """Moved by maps of these sizes and the output."""
        pixels = CHANNELS * sum(height * width for height, width in sizes)
        pixels += self.out_channels * self.sizes[0][0] * self.sizes[0][1]
        return self.batch * pixels * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    maps: list[Tensor]
    grad: Tensor


def cases(full: bool) -> Iterator[Case]:
    for name, (batch, sizes) in PYRAMIDS.items():
        fine, middle, coarse = sizes
        yield Case(name, batch, (fine, middle, middle))
        yield Case(name, batch, (fine, middle, middle), add=True)
        if full or name == "256x512":
            yield Case(name, batch, (middle, coarse))
            yield Case(name, batch, (fine, coarse), add=True)
        if full or name == "769x769":
            yield Case(name, batch, (fine, middle, middle), dtype=torch.float32)


def make_inputs(case: Case) -> Inputs:
    def random(channels: int, size: Size) -> Tensor:
        shape = (case.batch, *size, channels)
        return torch.randn(shape, device="cuda", dtype=case.dtype).movedim(-1, 1)

    maps = [random(CHANNELS, size) for size in case.sizes]
    return Inputs(maps, random(case.out_channels, case.sizes[0]))


def forward(case: Case, i: Inputs, config: StripConfig = FORWARD) -> Tensor:
    function = sum_upsample_forward if case.add else concat_upsample_forward
    return function(i.maps, case.sizes[0], config=config)


def backward(case: Case, i: Inputs, config: StripConfig = BACKWARD) -> list[Tensor]:
    if case.add:
        return sum_upsample_backward(i.grad, case.resized, config=config)
    channels = [CHANNELS] * len(case.sizes)
    return concat_upsample_backward(i.grad, channels, case.sizes, config=config)


def stock_forward(case: Case, maps: list[Tensor]) -> Tensor:
    size = case.sizes[0]
    resized = [
        x
        if tuple(x.shape[2:]) == size
        else F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        for x in maps
    ]
    if not case.add:
        return torch.cat(resized, dim=1)
    total = resized[0]
    for x in resized[1:]:
        total = total + x
    return total


def stock_backward(case: Case, grad: Tensor) -> list[Tensor]:
    """What autograd runs behind `stock_forward`."""
    parts = [grad] * len(case.sizes) if case.add else grad.split(CHANNELS, dim=1)
    return [
        part
        if size == case.sizes[0]
        else torch.ops.aten.upsample_bilinear2d_backward(
            part, case.sizes[0], (*part.shape[:2], *size), True
        )
        for part, size in zip(parts, case.sizes, strict=True)
    ]


def check(case: Case) -> None:
    i = make_inputs(case)
    leaves = [x.double().requires_grad_() for x in i.maps]
    truth = stock_forward(case, leaves)
    gradients = torch.autograd.grad(truth, leaves, i.grad.double())
    gate(f"forward {case}", forward(case, i), truth.detach())
    ours = backward(case, i)
    for number, (x_grad, expected) in enumerate(zip(ours, gradients[-len(ours) :], strict=True)):
        gate(f"gradient {number} {case}", x_grad, expected)


def stock_calls(case: Case, sets: list[Inputs], gradients: bool, layout: torch.memory_format):
    calls: list[Call] = []
    for i in sets:
        maps = [x.contiguous(memory_format=layout) for x in i.maps]
        grad = i.grad.contiguous(memory_format=layout)
        if gradients:
            calls.append(lambda grad=grad: stock_backward(case, grad))
        else:
            calls.append(lambda maps=maps: stock_forward(case, maps))
    return calls


def measure(case: Case, gradients: bool, bandwidth: float) -> dict[str, Any]:
    moved = case.bytes(case.resized if gradients else case.sizes)
    sets = [make_inputs(case) for _ in range(rotations(moved))]
    ours = backward if gradients else forward
    seconds = seconds_a_call([lambda i=i: ours(case, i) for i in sets])
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    stock = alternatives_seconds(
        {
            name: stock_calls(case, sets, gradients, memory_format)
            for name, memory_format in layouts.items()
        }
    )
    return {
        "case": f"{'backward' if gradients else 'forward '} {case}",
        "floor_us": moved / bandwidth * 1e6,
        "ours_us": seconds * 1e6,
        "stock_us": min(stock.values()) * 1e6,
        "stock": min(stock, key=stock.__getitem__),
        "bytes": moved,
    }


def sweep(case: Case, bandwidth: float) -> Iterator[dict[str, Any]]:
    sets = [make_inputs(case) for _ in range(rotations(case.bytes(case.sizes)))]
    kernels = {
        "forward": (forward, FORWARD, case.sizes),
        "backward": (backward, BACKWARD, case.resized),
    }
    for name, (kernel, default, sizes) in kernels.items():
        rows = []
        tiles = [(512, 2), (1024, 4), (2048, 4), (2048, 8)]
        for (block, warps), strip in itertools.product(tiles, (1, 2, 4, 8)):
            config = StripConfig(block, strip, warps)
            calls = [lambda i=i, f=kernel, c=config: f(case, i, c) for i in sets]
            rows.append({"config": str(config), "us": seconds_a_call(calls, replays=5) * 1e6})
        ours = next(row["us"] for row in rows if row["config"] == str(default))
        rows.sort(key=lambda row: row["us"])
        floor = case.bytes(sizes) / bandwidth * 1e6
        print(f"{name:<8} {case}: floor {floor:.1f}, default {ours:.1f}", flush=True)
        for row in rows[:4]:
            print(f"    {row['us']:7.1f} {row['config']}", flush=True)
        yield {"kernel": name, "case": str(case), "default_us": ours, "tiles": rows}


def table(full: bool, bandwidth: float) -> list[dict[str, Any]]:
    chosen = list(cases(full))
    for case in chosen:
        check(case)
    print(f"{len(chosen)} cases right")
    rows = []
    for case, gradients in itertools.product(chosen, (False, True)):
        rows.append(measure(case, gradients, bandwidth))
        print_row(rows[-1])
    return rows


def main() -> None:
    options = arguments("concatenation and sum of resized maps")
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    if options.part == "sweep":
        chosen = [case for case in cases(False) if case.batch == 16 and len(case.sizes) == 3]
        numbers = {"sweep": [row for case in chosen[:3] for row in sweep(case, bandwidth)]}
    else:
        numbers = {"table": table(options.part == "full", bandwidth)}
    origin = provenance(options.commit)
    write_json(options.out, origin | {"copy_bandwidth": bandwidth} | numbers)


if __name__ == "__main__":
    main()
