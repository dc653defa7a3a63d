"""The CUDA depthwise kernels against cuDNN and against the floor of bytes.

    python -m bench.kernels.native_depthwise --out FILE [--part table|sweep|full] [--commit HASH]

Checks every case against float64 first. `table`: selected cases with the default tiles; `full`:
every shape, dilation, stride and dtype; `sweep`: the best tiles on a few cases.

Floors, in bytes over the copy bandwidth of the same run: x + y forward, x + dy + dx backward. The
multiply-adds, 9 an output forward and 18 backward, take at most a third of that on any GPU since
Pascal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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
from lgcnet_fast.native import instances
from lgcnet_fast.native.depthwise import (
    Tile,
    backward_tile,
    depthwise_backward,
    depthwise_forward,
    forward_tile,
)
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import STORAGE

Shape = tuple[int, int, int, int]
SELECTED = [(16, 32, 64, 128), (16, 64, 64, 128), (16, 64, 32, 64), (16, 128, 16, 32)]
OTHERS = [
    *[(16, 48, 64, 128), (16, 48, 32, 64), (16, 48, 16, 32)],
    *[(16, 32, 193, 193), (16, 64, 97, 97), (16, 128, 49, 49), (16, 48, 193, 193)],
    *[(16, 32, 90, 120), (16, 64, 45, 60), (16, 128, 23, 30), (16, 48, 90, 120)],
    *[(1, 32, 193, 385), (1, 64, 97, 193), (1, 128, 49, 97), (1, 48, 193, 385)],
]
DILATIONS = (1, 2, 4, 8, 12)
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    shape: Shape
    dilation: int
    stride: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape} d{self.dilation} s{self.stride} {dtype}"

    @property
    def out_shape(self) -> Shape:
        images, channels, height, width = self.shape
        return images, channels, -(-height // self.stride), -(-width // self.stride)

    @property
    def x_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def y_bytes(self) -> int:
        return torch.Size(self.out_shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    dy: Tensor


Kernel = Callable[[Case, Inputs, Tile | None], Any]


def make_inputs(case: Case) -> Inputs:
    def values(shape: Shape) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=case.dtype).contiguous(
            memory_format=torch.channels_last
        )

    weight = torch.randn(3, 3, case.shape[1], device="cuda")
    return Inputs(values(case.shape), weight, values(case.out_shape))


def forward(case: Case, i: Inputs, tile: Tile | None = None) -> Tensor:
    geometry = {"dilation": case.dilation, "stride": case.stride}
    return depthwise_forward(i.x, i.weight, **geometry, tile=tile)


def backward(case: Case, i: Inputs, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    geometry = {"dilation": case.dilation, "stride": case.stride}
    return depthwise_backward(i.x, i.weight, i.dy, **geometry, tile=tile)


def check(case: Case) -> None:
    i = make_inputs(case)
    x, weight = i.x.double().requires_grad_(), i.weight.double().requires_grad_()
    kernel = weight.permute(2, 0, 1).unsqueeze(1)
    d, channels = case.dilation, case.shape[1]
    y = F.conv2d(x, kernel, None, case.stride, d, d, channels)
    dx, dw = torch.autograd.grad(y, (x, weight), i.dy.double())
    gate(f"forward {case}", forward(case, i), y.detach())
    ours_dx, ours_dw = backward(case, i)
    gate(f"input gradient {case}", ours_dx, dx)
    gate(f"weight gradient {case}", ours_dw, dw)


def stock_calls(
    case: Case, sets: Sequence[Inputs], gradients: bool, layout: torch.memory_format
) -> list[Callable[[], Any]]:
    """PyTorch's convolution, with weights of the maps' dtype as in autocast."""
    d, channels, stride = case.dilation, case.shape[1], case.stride

    def call(i: Inputs) -> Callable[[], Any]:
        x, dy = (tensor.contiguous(memory_format=layout) for tensor in (i.x, i.dy))
        kernel = i.weight.to(case.dtype).permute(2, 0, 1).unsqueeze(1)
        kernel = kernel.contiguous(memory_format=layout)
        if not gradients:
            return lambda: F.conv2d(x, kernel, None, stride, d, d, channels)
        options = ([stride] * 2, [d] * 2, [d] * 2, False, [0, 0], channels, [True, True, False])
        return lambda: torch.ops.aten.convolution_backward(dy, x, kernel, None, *options)

    return [call(i) for i in sets]


def measure(case: Case, gradients: bool, bandwidth: float) -> dict[str, Any]:
    moved = case.y_bytes + case.x_bytes * (2 if gradients else 1)
    sets = [make_inputs(case) for _ in range(rotations(moved))]
    ours: Kernel = backward if gradients else forward
    seconds = seconds_a_call([lambda i=i: ours(case, i, None) for i in sets])
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    stock = alternatives_seconds(
        {
            layout: stock_calls(case, sets, gradients, memory_format)
            for layout, memory_format in layouts.items()
        }
    )
    best = min(stock, key=stock.__getitem__)
    return {
        "case": f"{'backward' if gradients else 'forward '} {case}",
        "floor_us": moved / bandwidth * 1e6,
        "ours_us": seconds * 1e6,
        "stock_us": stock[best] * 1e6,
        "stock": best,
        "alternatives_us": {name: seconds * 1e6 for name, seconds in stock.items()},
        "bytes": moved,
        "multiply_adds": 9 * case.y_bytes // case.dtype.itemsize * (2 if gradients else 1),
    }


def selected() -> Iterator[Case]:
    large = SELECTED[1]
    for shape, d in itertools.product([*SELECTED, OTHERS[4], OTHERS[-3]], (1, 8)):
        yield Case(shape, d)
    for d in (1, 8):
        yield Case(large, d, dtype=torch.float32)
        yield Case(large, d, stride=2)


def everything() -> Iterator[Case]:
    for shape, d, stride, dtype in itertools.product(SELECTED + OTHERS, DILATIONS, (1, 2), DTYPES):
        yield Case(shape, d, stride, dtype)


def table(cases: Sequence[Case], bandwidth: float) -> list[dict[str, Any]]:
    for case in cases:
        check(case)
    print(f"{len(cases)} cases right, {load().route}")
    rows = []
    for case, gradients in itertools.product(cases, (False, True)):
        rows.append(measure(case, gradients, bandwidth))
        print_row(rows[-1])
    return rows


def tiles(case: Case, gradients: bool) -> Iterator[Tile]:
    """The default, then every compiled kernel with a few sizes of block and numbers of blocks."""
    i = make_inputs(case)
    stride = 2 if case.stride == 2 and case.dilation % 2 else 1  # the kernel's, not the case's
    yield backward_tile(i.x, i.dy, i.x, stride) if gradients else forward_tile(i.x, i.dy)
    for one in instances.all_instances():
        if not one.kernel.startswith("depthwise") or STORAGE[case.dtype] not in one.parameters[0]:
            continue
        vector, *walk = map(int, one.parameters[1:])
        if vector == 1:
            continue
        if one.kernel == "depthwise_forward" and not gradients and walk[0] == stride:
            narrow = vector * case.dtype.itemsize <= 8
            yield from (Tile(vector, *walk[1:], n) for n in (128, 256, *((512,) if narrow else ())))
        elif gradients and one.kernel == (
            "depthwise_backward" if stride == 1 else "depthwise_backward_stride2"
        ):
            columns, rows = walk or (1, 1)
            for threads, blocks in ((128, 2), (128, 4), (128, 8), (256, 1), (256, 2), (256, 4)):
                yield Tile(vector, columns, rows, threads, blocks)


def sweep(case: Case, gradients: bool, bandwidth: float) -> dict[str, Any]:
    moved = case.y_bytes + case.x_bytes * (2 if gradients else 1)
    sets = [make_inputs(case) for _ in range(rotations(moved))]
    kernel: Kernel = backward if gradients else forward
    rows = []
    for tile in tiles(case, gradients):
        calls = [lambda i=i, t=tile: kernel(case, i, t) for i in sets]
        rows.append({"tile": str(tile), "us": seconds_a_call(calls, replays=5) * 1e6})
    default = rows[0]["us"]
    rows.sort(key=lambda row: row["us"])
    floor = moved / bandwidth * 1e6
    name = "backward" if gradients else "forward"
    print(f"{name:<8} {case}: floor {floor:.1f}, default {default:.1f}", flush=True)
    for row in rows[:3]:
        print(f"    {row['us']:7.1f} {row['tile']}", flush=True)
    return {"kernel": name, "case": str(case), "floor_us": floor, "tiles": rows}


def sweeps(bandwidth: float) -> list[dict[str, Any]]:
    cases = [
        *(Case(SELECTED[1], d) for d in (1, 8)),
        *(Case(shape, 4) for shape in SELECTED[2:]),
        Case(SELECTED[1], 1, stride=2),
        Case((16, 48, 193, 193), 4),
        *(Case(SELECTED[1], d, dtype=torch.float32) for d in (1, 8)),
    ]
    return [sweep(case, gradients, bandwidth) for case in cases for gradients in (False, True)]


def main() -> None:
    options = arguments("CUDA depthwise kernels")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    if options.part == "sweep":
        numbers = {"sweep": sweeps(bandwidth)}
    else:
        cases = everything() if options.part == "full" else selected()
        numbers = {"table": table(list(cases), bandwidth)}
    origin = provenance(options.commit)
    write_json(options.out, origin | {"copy_bandwidth": bandwidth} | numbers)


if __name__ == "__main__":
    main()
