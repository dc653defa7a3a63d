"""The CUDA resizing kernels against PyTorch and against the floor of bytes.

    python -m bench.kernels.native_upsample --out FILE [--part table|sweep|full] [--commit HASH]

Checks every case against float64 first. `table` and `full`: concatenations of the fusion cell and
its pooled branches; `sweep`: from which enlargement on the backward does better an axis at a time.

Floors, in bytes over the copy bandwidth of the same run: every map and the result once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

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
from lgcnet_fast.native import upsample
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.upsample import (
    concat_upsample_backward,
    concat_upsample_forward,
    upsample_backward,
)

Size = tuple[int, int]
CHANNELS = 48


@dataclass(frozen=True)
class Case:
    """Maps of `CHANNELS` channels and these sizes side by side at `size`."""

    images: int
    sizes: tuple[Size, ...]
    size: Size
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        parts = "+".join(f"{height}x{width}" for height, width in self.sizes)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.images} x {parts} to {self.size[0]}x{self.size[1]} {dtype}"

    @property
    def bytes(self) -> int:
        pixels = sum(height * width for height, width in self.sizes)
        pixels += len(self.sizes) * self.size[0] * self.size[1]
        return self.images * CHANNELS * pixels * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    maps: list[Tensor]
    dy: Tensor


def make_inputs(case: Case, layout: torch.memory_format = torch.channels_last) -> Inputs:
    def values(channels: int, size: Size) -> Tensor:
        shape = (case.images, channels, *size)
        return torch.randn(shape, device="cuda", dtype=case.dtype).contiguous(memory_format=layout)

    maps = [values(CHANNELS, size) for size in case.sizes]
    return Inputs(maps, values(CHANNELS * len(maps), case.size))


def reference(maps: Sequence[Tensor], size: Size) -> Tensor:
    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)

    return torch.cat([x if x.shape[2:] == size else resized(x) for x in maps], dim=1)


def backward(case: Case, i: Inputs) -> list[Tensor]:
    return concat_upsample_backward(i.dy, [CHANNELS] * len(case.sizes), case.sizes)


def check(case: Case) -> None:
    i = make_inputs(case)
    maps = [x.double().requires_grad_() for x in i.maps]
    y = reference(maps, case.size)
    gradients = torch.autograd.grad(y, maps, i.dy.double())
    gate(f"forward {case}", concat_upsample_forward(i.maps, case.size), y.detach())
    for ours, exact in zip(backward(case, i), gradients, strict=True):
        gate(f"backward {case}", ours, exact)


def stock_calls(
    case: Case, count: int, gradients: bool, layout: torch.memory_format
) -> list[Callable[[], Any]]:
    def call(i: Inputs) -> Callable[[], Any]:
        if not gradients:
            return lambda: reference(i.maps, case.size)

        def run() -> list[Tensor]:
            found = []
            for part, own in zip(i.dy.split(CHANNELS, dim=1), case.sizes, strict=True):
                shape = [case.images, CHANNELS, *own]
                found.append(
                    part.clone()
                    if own == case.size
                    else torch.ops.aten.upsample_bilinear2d_backward(part, case.size, shape, True)
                )
            return found

        return run

    return [call(make_inputs(case, layout)) for _ in range(count)]


def measure(case: Case, gradients: bool, bandwidth: float) -> dict[str, Any]:
    count = rotations(case.bytes)
    sets = [make_inputs(case) for _ in range(count)]
    seconds = seconds_a_call(
        [lambda i=i: backward(case, i) for i in sets]
        if gradients
        else [lambda i=i: concat_upsample_forward(i.maps, case.size) for i in sets]
    )
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    stock = alternatives_seconds(
        {name: stock_calls(case, count, gradients, layout) for name, layout in layouts.items()}
    )
    best = min(stock, key=stock.__getitem__)
    return {
        "case": f"{'backward' if gradients else 'forward '} {case}",
        "floor_us": case.bytes / bandwidth * 1e6,
        "ours_us": seconds * 1e6,
        "stock_us": stock[best] * 1e6,
        "stock": best,
        "alternatives_us": {name: seconds * 1e6 for name, seconds in stock.items()},
        "bytes": case.bytes,
    }


def cases(full: bool) -> list[Case]:
    found = []
    dtypes = (torch.bfloat16, torch.float32) if full else (torch.bfloat16,)
    places = [(16, (64, 128)), (16, (193, 193)), (16, (90, 120)), (1, (193, 385))]
    for (images, size), dtype in itertools.product(places if full else places[:2], dtypes):
        half = tuple(-(-extent // 2) for extent in size)
        found.append(Case(images, (size, half, half), size, dtype))
        found += [Case(images, ((bins, bins),), size, dtype) for bins in (1, 2, 5)]
    return found


def table(full: bool, bandwidth: float) -> list[dict[str, Any]]:
    for case in cases(full):
        check(case)
    print(f"{len(cases(full))} cases right, {load().route}")
    rows = []
    for case, gradients in itertools.product(cases(full), (False, True)):
        rows.append(measure(case, gradients, bandwidth))
        print_row(rows[-1])
    return rows


def sweep() -> list[dict[str, Any]]:
    """The backward of one map to 96 x 192, from ever smaller maps, in both ways."""
    rows = []
    for factor in (2, 4, 6, 8, 12, 16, 32):
        size = (96 // factor, 192 // factor)
        case = Case(16, (size,), (96, 192))
        sets = [make_inputs(case) for _ in range(rotations(case.bytes))]
        times = {}
        for name, limit in (("at once", 10**9), ("by axes", 0)):
            with mock.patch.object(upsample, "LONG_SUPPORT", limit):
                calls = [lambda i=i, own=size: upsample_backward(i.dy, own) for i in sets]
                times[name] = seconds_a_call(calls) * 1e6
        print(f"{case}: " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()))
        rows.append({"case": str(case), "us": times})
    return rows


def main() -> None:
    options = arguments("CUDA resizing kernels")
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    if options.part == "sweep":
        numbers = {"sweep": sweep()}
    else:
        numbers = {"table": table(options.part == "full", bandwidth)}
    origin = provenance(options.commit)
    write_json(options.out, origin | {"copy_bandwidth": bandwidth} | numbers)


if __name__ == "__main__":
    main()
