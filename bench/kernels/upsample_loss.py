"""Final upsampling fused with losses and argmax, against PyTorch and the floor of bytes.

    python -m bench.kernels.upsample_loss --out FILE [--part table|sweep|full] [--commit HASH]

Checks every case against float64 first. `table`: cross entropy and OHEM with their gradients,
cross entropy without (validation), argmax, with the default tiles. `sweep`: the best tile sizes.
Either takes about a minute; `full` adds int64 labels, float32 logits and other sizes.

Floors, over the copy bandwidth of the same run: logits and labels once, with the gradient also
that of the logits. They are far below what the arithmetic takes: an exponential and some ten
operations a class and pixel, which the column Gop counts.
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
from lgcnet_fast.kernels.upsample_argmax import ARGMAX, upsample_argmax_forward
from lgcnet_fast.kernels.upsample_cells import CellConfig
from lgcnet_fast.kernels.upsample_loss import (
    LOSS,
    upsample_cross_entropy_forward,
    upsample_loss_backward,
    upsample_ohem_forward,
)
from lgcnet_fast.ops import upsample_loss as reference

Size = tuple[int, int]
THRESHOLD, KEEP = 0.7, 1 / 16
OPERATIONS = {"argmax": 4, "validation": 7, "cross entropy": 11, "ohem": 18}
"""Arithmetic operations a class and pixel."""


@dataclass(frozen=True)
class Case:
    kind: str
    batch: int
    classes: int
    size: Size
    full: Size
    labels: torch.dtype = torch.uint8
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtypes = "/".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.labels))
        logits = f"{self.batch}x{self.classes}x{self.size[0]}x{self.size[1]}"
        return f"{self.kind} {logits}->{self.full[0]}x{self.full[1]} {dtypes}"

    @property
    def pixels(self) -> int:
        return self.batch * self.full[0] * self.full[1]

    @property
    def bytes(self) -> int:
        logits = self.batch * self.classes * self.size[0] * self.size[1] * self.dtype.itemsize
        passes = 2 if self.kind in ("cross entropy", "ohem") else 1
        return passes * logits + self.pixels * self.labels.itemsize


@dataclass(frozen=True)
class Inputs:
    logits: Tensor
    labels: Tensor


SEARCH = (16, 19, (64, 128), (256, 512))
PAPER = (16, 19, (193, 193), (769, 769))
CAMVID = (16, 11, (90, 120), (360, 480))
INFERENCE = (1, 19, (193, 385), (1024, 2048))


def cases(full: bool) -> Iterator[Case]:
    for shape in (SEARCH, PAPER, CAMVID):
        yield Case("cross entropy", *shape)
    for shape in (CAMVID, SEARCH):
        yield Case("ohem", *shape)
    yield Case("validation", *CAMVID)
    yield Case("argmax", *INFERENCE)
    yield Case("argmax", *CAMVID)
    if full:
        yield Case("cross entropy", *SEARCH, labels=torch.int64)
        yield Case("cross entropy", *SEARCH, dtype=torch.float32)
        yield Case("cross entropy", 16, 19, (16, 32), (256, 512))
        yield Case("ohem", 8, 19, (193, 385), (769, 1537))
        yield Case("argmax", 1, 19, (193, 385), (769, 1537))


def make_inputs(case: Case) -> Inputs:
    shape = (case.batch, *case.size, case.classes)
    logits = 3 * torch.randn(shape, device="cuda")
    labels = torch.randint(case.classes, (case.batch, *case.full), device="cuda")
    labels[torch.rand(labels.shape, device="cuda") < 0.05] = 255
    return Inputs(logits.to(case.dtype).movedim(-1, 1), labels.to(case.labels))


def ours(case: Case, i: Inputs, config: CellConfig | None = None) -> tuple[Tensor, ...]:
    """The labels, or the loss and, but for validation, its gradient."""
    if case.kind == "argmax":
        return (upsample_argmax_forward(i.logits, case.full, config=config or ARGMAX),)
    config = config or LOSS
    if case.kind == "ohem":
        loss, sums = upsample_ohem_forward(i.logits, i.labels, THRESHOLD, KEEP, config=config)
    else:
        gradient = case.kind != "validation"
        loss, sums = upsample_cross_entropy_forward(
            i.logits, i.labels, gradient=gradient, config=config
        )
    if sums is None:
        return (loss,)
    return loss, upsample_loss_backward(sums, torch.ones_like(loss), i.logits)


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """As most training code has it under autocast: resized in the storage dtype."""
    full = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(full.float(), labels, ignore_index=255)


def stock(case: Case, logits: Tensor, labels: Tensor, resize_fp32: bool) -> tuple[Tensor, ...]:
    if case.kind == "argmax":
        return (reference.upsample_argmax(logits, case.full),)
    if case.kind == "validation":
        return (_stock_loss(case, logits, labels, resize_fp32),)
    leaf = logits.detach().requires_grad_()
    loss = _stock_loss(case, leaf, labels, resize_fp32)
    return loss, *torch.autograd.grad(loss, leaf)


def _stock_loss(case: Case, logits: Tensor, labels: Tensor, resize_fp32: bool) -> Tensor:
    if case.kind == "ohem":
        return reference.upsample_ohem(logits, labels, THRESHOLD, KEEP)
    if resize_fp32:
        return reference.upsample_cross_entropy(logits, labels)
    return plain_cross_entropy(logits, labels)


def check(case: Case) -> None:
    i = make_inputs(case)
    results = ours(case, i)
    if case.kind == "argmax":
        truth = reference.upsample_argmax(i.logits.double(), case.full)
        if (results[0] != truth).float().mean() > 1e-4:
            raise SystemExit(f"WRONG RESULT: {case}")
        return
    truths = stock(case, i.logits.double(), i.labels, resize_fp32=True)
    for name, result, truth in zip(("loss", "gradient"), results, truths, strict=False):
        gate(f"{name} {case}", result, truth.detach())


def stock_calls(
    case: Case, sets: list[Inputs], layout: torch.memory_format, resize_fp32: bool
) -> list[Callable[[], Any]]:
    calls = []
    for i in sets:
        logits = i.logits.contiguous(memory_format=layout)
        labels = i.labels.long()  # Other integers would be converted in every call.
        calls.append(lambda x=logits, y=labels: stock(case, x, y, resize_fp32))
    return calls


def measure(case: Case, bandwidth: float) -> dict[str, Any]:
    sets = [make_inputs(case) for _ in range(min(rotations(case.bytes), 8))]
    seconds = seconds_a_call([lambda i=i: ours(case, i) for i in sets])
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    resizes = {"storage": False, "float32": True}
    times = alternatives_seconds(
        {
            f"{layout} {resize}": stock_calls(case, sets[:2], layouts[layout], resizes[resize])
            for layout, resize in itertools.product(layouts, resizes)
        }
    )
    row = {
        "case": str(case),
        "floor_us": case.bytes / bandwidth * 1e6,
        "ours_us": seconds * 1e6,
        "stock_us": min(times.values()) * 1e6,
        "stock": min(times, key=times.__getitem__),
        "bytes": case.bytes,
        "operations": OPERATIONS[case.kind] * case.pixels * case.classes,
    }
    print_row(row)
    print(f"    {row['operations'] / 1e9:.1f} Gop, {row['operations'] / seconds / 1e12:.1f} Top/s")
    return row


def sweep(case: Case) -> dict[str, Any]:
    sets = [make_inputs(case) for _ in range(4)]
    default = ARGMAX if case.kind == "argmax" else LOSS
    rows = []
    for (lanes, warps), strip in itertools.product([(32, 1), (64, 2), (128, 4)], (1, 2, 4, 8)):
        config = CellConfig(lanes, strip, warps)
        calls = [lambda i=i, c=config: ours(case, i, c) for i in sets]
        rows.append({"config": str(config), "us": seconds_a_call(calls, replays=5) * 1e6})
    default_us = next(row["us"] for row in rows if row["config"] == str(default))
    rows.sort(key=lambda row: row["us"])
    print(f"{case}: default {default_us:.1f}", flush=True)
    for row in rows[:4]:
        print(f"    {row['us']:7.1f} {row['config']}", flush=True)
    return {"case": str(case), "default_us": default_us, "tiles": rows}


def table(full: bool, bandwidth: float) -> list[dict[str, Any]]:
    chosen = list(cases(full))
    for case in chosen:
        check(case)
    print(f"{len(chosen)} cases right")
    return [measure(case, bandwidth) for case in chosen]


def main() -> None:
    options = arguments("final upsampling fused with losses and argmax")
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    if options.part == "sweep":
        chosen = [Case("cross entropy", *SEARCH), Case("cross entropy", *CAMVID)]
        chosen += [Case("argmax", *INFERENCE)]
        numbers = {"sweep": [sweep(case) for case in chosen]}
    else:
        numbers = {"table": table(options.part == "full", bandwidth)}
    origin = provenance(options.commit)
    write_json(options.out, origin | {"copy_bandwidth": bandwidth} | numbers)


if __name__ == "__main__":
    main()
