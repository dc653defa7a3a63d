"""Depthwise kernels against cuDNN and against the floor of bytes.

    python -m bench.kernels.depthwise --out FILE [--part table|sweep|full] [--commit HASH]

Checks every case against float64 first. `table`: single branches (forward; input + weight
gradient) and the branches of a cell's input, which stock runs one by one, with the default tiles.
`sweep`: the best tile sizes on a few shapes. Either takes about a minute; `full` is the table of
every shape, dilation, stride and dtype.

Floors, in bytes over the copy bandwidth of the same run: x + y forward, x + dy + dx backward;
with K branches x + K y and x + K dy + dx.
"""

from __future__ import annotations

import itertools
import random
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
from lgcnet_fast.kernels.depthwise import ForwardConfig, depthwise_multi
from lgcnet_fast.kernels.depthwise_backward import depthwise_backward
from lgcnet_fast.kernels.depthwise_input_grad import (
    InputGradConfig,
    depthwise_multi_input_grad,
)
from lgcnet_fast.kernels.depthwise_weight_grad import (
    WeightGradConfig,
    depthwise_multi_weight_grad,
)

Shape = tuple[int, int, int, int]
CELLS_256X512 = [(16, 32, 64, 128), (16, 64, 64, 128), (16, 64, 32, 64), (16, 128, 16, 32)]
FUSION_256X512 = [(16, 48, 64, 128), (16, 48, 32, 64), (16, 48, 16, 32)]
OTHERS = [
    *[(16, 32, 193, 193), (16, 64, 97, 97), (16, 128, 49, 49), (16, 48, 193, 193)],
    *[(16, 32, 90, 120), (16, 64, 45, 60), (16, 128, 23, 30), (16, 48, 90, 120)],
    *[(1, 32, 193, 385), (1, 64, 97, 193), (1, 128, 49, 97), (1, 48, 193, 385)],
]
DILATIONS = (1, 2, 4, 8, 12)


@dataclass(frozen=True)
class Case:
    shape: Shape
    dilations: tuple[int, ...]
    stride: int = 1
    edges: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape} d{self.dilations} s{self.stride} e{self.edges} {dtype}"

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple(-(-size // self.stride) for size in self.shape[2:])

    @property
    def maps(self) -> int:
        return self.edges * len(self.dilations)

    @property
    def x_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def y_bytes(self) -> int:
        elements = torch.Size((*self.shape[:2], *self.out_size)).numel()
        return self.maps * elements * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weights: Tensor
    dy: Tensor


def make_inputs(case: Case) -> Inputs:
    images, channels, height, width = case.shape
    branches = len(case.dilations)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=case.dtype)

    return Inputs(
        values(images, height, width, channels).movedim(-1, -3),
        torch.randn(case.edges, branches, 3, 3, channels, device="cuda"),
        values(case.edges, branches, images, *case.out_size, channels).movedim(-1, -3),
    )


def single_branches(full: bool) -> Iterator[Case]:
    """Of the selection, the large map also in float32 and with stride 2."""
    large = CELLS_256X512[1]
    if not full:
        for shape, d in itertools.product([*CELLS_256X512, OTHERS[1], OTHERS[-3]], (1, 8)):
            yield Case(shape, (d,))
        for d in (1, 8):
            yield Case(large, (d,), dtype=torch.float32)
            yield Case(large, (d,), stride=2)
        return
    dtypes = (torch.bfloat16, torch.float32)
    shapes = CELLS_256X512 + FUSION_256X512 + OTHERS
    for shape, d, stride, dtype in itertools.product(shapes, DILATIONS, (1, 2), dtypes):
        yield Case(shape, (d,), stride, dtype=dtype)
    draw = random.Random(0)
    for _ in range(10):
        shape = (draw.randint(1, 16), draw.randint(8, 200), *(draw.randint(9, 200),) * 2)
        yield Case(shape, (draw.choice(DILATIONS),), draw.choice((1, 2)))


def cell_inputs() -> Iterator[Case]:
    """What leaves an input of a cell (two edges, sep3's first and dil3_*), and a fusion edge."""
    for shape in CELLS_256X512:
        yield Case(shape, (1, 2, 4, 8), stride=2 if shape == (16, 64, 64, 128) else 1, edges=2)
    yield Case((16, 48, 64, 128), DILATIONS)


def reference(x: Tensor, weights: Tensor, case: Case) -> Tensor:
    """float64, as nine shifted products."""
    (height, width), stride = case.out_size, case.stride
    maps = []
    for edge in weights.double():
        for weight, d in zip(edge, case.dilations, strict=True):
            padded = F.pad(x, (d, d, d, d))
            total = torch.zeros(*x.shape[:2], height, width, dtype=x.dtype, device=x.device)
            for u, v in itertools.product(range(3), range(3)):
                window = padded[:, :, u * d :, v * d :][:, :, ::stride, ::stride]
                total = total + weight[u, v][:, None, None] * window[:, :, :height, :width]
            maps.append(total)
    return torch.stack(maps).view(case.edges, len(case.dilations), *maps[0].shape)


def check(case: Case) -> None:
    inputs = make_inputs(case)
    x, weights = inputs.x.double().requires_grad_(), inputs.weights.double().requires_grad_()
    y = reference(x, weights, case)
    dx, dw = torch.autograd.grad(y, (x, weights), inputs.dy.double())
    gate(f"forward {case}", forward(case, inputs), y.detach())
    ours_dx, ours_dw = backward(case, inputs)
    gate(f"input gradient {case}", ours_dx, dx)
    gate(f"weight gradient {case}", ours_dw, dw)


def forward(case: Case, i: Inputs, config: ForwardConfig | None = None) -> Tensor:
    return depthwise_multi(i.x, i.weights, case.dilations, case.stride, config=config)


def input_grad(case: Case, i: Inputs, config: InputGradConfig | None = None) -> Tensor:
    arguments = (case.dilations, case.stride)
    return depthwise_multi_input_grad(i.dy, i.x, i.weights, *arguments, config=config)


def weight_grad(case: Case, i: Inputs, config: WeightGradConfig | None = None) -> Tensor:
    arguments = (case.dilations, case.stride)
    return depthwise_multi_weight_grad(i.dy, i.x, i.weights, *arguments, config=config)


def fused_backward(
    case: Case, i: Inputs, config: WeightGradConfig | None = None
) -> tuple[Tensor, Tensor]:
    (dilation,) = case.dilations
    dx, dw = depthwise_backward(
        i.dy[0, 0], i.x, i.weights[0, 0], dilation, case.stride, config=config
    )
    return dx, dw[None, None]


def backward(case: Case, i: Inputs) -> tuple[Tensor, Tensor]:
    if case.maps == 1:
        return fused_backward(case, i)
    return input_grad(case, i), weight_grad(case, i)


def stock_calls(case: Case, sets: list[Inputs], gradients: bool, layout: torch.memory_format):
    """The convolutions of PyTorch, one by one, with weights of the maps' dtype as in autocast."""
    channels = case.shape[1]
    calls = []
    for i in sets:
        x = i.x.contiguous(memory_format=layout)
        kernels = i.weights.to(case.dtype).movedim(-1, 2)[:, :, :, None].contiguous()
        branches = [
            (
                kernels[e, b].contiguous(memory_format=layout),
                d,
                i.dy[e, b].clone(memory_format=layout),
            )
            for e in range(case.edges)
            for b, d in enumerate(case.dilations)
        ]

        def run(x=x, branches=branches):
            if not gradients:
                return [F.conv2d(x, w, None, case.stride, d, d, channels) for w, d, _ in branches]
            results = []
            for w, d, dy in branches:
                options = ([case.stride] * 2, [d] * 2, [d] * 2, False, [0, 0], channels)
                mask = [True, True, False]
                results.append(
                    torch.ops.aten.convolution_backward(dy, x, w, None, *options, mask)[:2]
                )
            dx = results[0][0]
            for other, _ in results[1:]:
                dx = dx + other
            return dx, results

        calls.append(run)
    return calls


def measure(case: Case, gradients: bool, bandwidth: float) -> dict[str, Any]:
    moved = case.y_bytes + case.x_bytes * (2 if gradients else 1)
    sets = [make_inputs(case) for _ in range(rotations(moved))]
    ours = backward if gradients else forward
    seconds = seconds_a_call([lambda i=i: ours(case, i) for i in sets])
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    stock = alternatives_seconds(
        {
            layout: stock_calls(case, sets, gradients, memory_format)
            for layout, memory_format in layouts.items()
        }
    )
    return {
        "case": f"{'backward' if gradients else 'forward '} {case}",
        "floor_us": moved / bandwidth * 1e6,
        "ours_us": seconds * 1e6,
        "stock_us": min(stock.values()) * 1e6,
        "stock": min(stock, key=stock.__getitem__),
        "bytes": moved,
        "multiply_adds": 9 * case.y_bytes // case.dtype.itemsize * (2 if gradients else 1),
    }


def tiles(kernel: Callable[..., Any], case: Case) -> Iterator[Any]:
    """Tile sizes worth trying; the first is the default."""
    channels = case.shape[1]
    y_shape = (case.edges, len(case.dilations), case.shape[0], channels, *case.out_size)
    if kernel is forward:
        yield ForwardConfig.default(y_shape, case.dilations, case.stride)
        blocks = [(16, 32, 4), (8, 64, 4), (16, 64, 4), (32, 32, 4), (32, 16, 4)]
        for rows, (p, c, warps) in itertools.product((2, 4, 8), blocks):
            yield ForwardConfig(rows, p, c, warps)
    elif kernel is input_grad:
        yield InputGradConfig.default(channels, case.stride)
        blocks = [(16, 32, 4), (32, 32, 4), (16, 64, 4), (32, 64, 4), (64, 32, 4), (64, 64, 8)]
        for p, c, warps in [*blocks, (64, 16, 4)]:
            yield InputGradConfig(p, c, warps)
    else:
        yield WeightGradConfig.default(y_shape, case.dilations, case.stride)
        blocks = [(16, 32, 4), (8, 64, 4), (8, 32, 4), (32, 16, 4)]
        for rows, (p, c, warps) in itertools.product((4, 8), blocks):
            for programs in (264, 528):
                yield WeightGradConfig(rows, p, c, warps, programs)


def sweep(case: Case, bandwidth: float) -> Iterator[dict[str, Any]]:
    sets = [make_inputs(case) for _ in range(rotations(case.x_bytes + case.y_bytes))]
    kernels = [forward, input_grad, weight_grad]
    if case.maps == 1 and case.dilations[0] % case.stride == 0:
        kernels.append(fused_backward)
    for kernel in kernels:
        rows = []
        for config in tiles(kernel, case):
            calls = [lambda i=i, c=config, k=kernel: k(case, i, c) for i in sets]
            rows.append({"config": str(config), "us": seconds_a_call(calls, replays=5) * 1e6})
        default = rows[0]["us"]
        rows.sort(key=lambda row: row["us"])
        x_maps = 2 if kernel is fused_backward else 1
        floor = (x_maps * case.x_bytes + case.y_bytes) / bandwidth * 1e6
        print(f"{kernel.__name__:<14} {case}: floor {floor:.1f}, default {default:.1f}", flush=True)
        for row in rows[:3]:
            print(f"    {row['us']:7.1f} {row['config']}", flush=True)
        yield {"kernel": kernel.__name__, "case": str(case), "default_us": default, "tiles": rows}


def table(full: bool, bandwidth: float) -> list[dict[str, Any]]:
    cases = [*single_branches(full), *cell_inputs()]
    for case in cases:
        check(case)
    print(f"{len(cases)} cases right")
    rows = []
    for case, gradients in itertools.product(cases, (False, True)):
        rows.append(measure(case, gradients, bandwidth))
        print_row(rows[-1])
    return rows


def sweeps(bandwidth: float) -> list[dict[str, Any]]:
    cases = [Case(shape, (4,)) for shape in CELLS_256X512[1:]]
    cases += [Case(CELLS_256X512[1], (8,)), Case(CELLS_256X512[1], (1,), stride=2)]
    cases += [Case((16, 48, 64, 128), (8,))]
    cases += [Case(CELLS_256X512[2], (1, 2, 4, 8), edges=2)]
    return [row for case in cases for row in sweep(case, bandwidth)]


def main() -> None:
    options = arguments("depthwise kernels")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    if options.part == "sweep":
        numbers = {"sweep": sweeps(bandwidth)}
    else:
        numbers = {"table": table(options.part == "full", bandwidth)}
    origin = provenance(options.commit)
    write_json(options.out, origin | {"copy_bandwidth": bandwidth} | numbers)


if __name__ == "__main__":
    main()
