"""Final upsampling fused with losses and argmax: `python -m bench.kernels.upsample_loss`.

Floors: logits and labels once, with the gradient also that of the logits. They are far below what
the arithmetic takes: an exponential and some ten operations a class and pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.command import main
from bench.kernels.comparison import Binding, Comparison, Family, Part, Sweep
from bench.kernels.keys import case_of_key
from bench.kernels.shapes import CLASSES, INPUTS, Size, at_stride
from bench.kernels.timing import Call, gate
from bench.stock.losses import hardest_pixels_loss, resized_cross_entropy
from lgcnet_fast.kernels.upsample_argmax import ARGMAX, upsample_argmax_forward
from lgcnet_fast.kernels.upsample_cells import CellConfig
from lgcnet_fast.kernels.upsample_loss import (
    LOSS,
    upsample_cross_entropy_forward,
    upsample_loss_backward,
    upsample_ohem_forward,
)
from lgcnet_fast.ops.fused_loss import loss_key

THRESHOLD, KEEP = 0.7, 1 / 16
OPERATIONS = {"argmax": 4, "validation": 7, "cross entropy": 11, "ohem": 18}
"""Arithmetic operations a class and pixel."""
CAMVID_CLASSES = 11


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
        return f"{logits} to {self.full[0]}x{self.full[1]} {dtypes}"

    @property
    def pixels(self) -> int:
        return self.batch * self.full[0] * self.full[1]

    @property
    def has_gradient(self) -> bool:
        return self.kind in ("cross entropy", "ohem")

    @property
    def bytes(self) -> int:
        logits = self.batch * self.classes * self.size[0] * self.size[1] * self.dtype.itemsize
        return (2 if self.has_gradient else 1) * logits + self.pixels * self.labels.itemsize


@dataclass(frozen=True)
class Inputs:
    logits: Tensor
    labels: Tensor


def cases(part: Part) -> Iterator[Case]:
    if part == "dry":
        yield from (Case(kind, 1, 3, (3, 4), (5, 7), dtype=torch.float32) for kind in OPERATIONS)
        return
    inputs = {size: (batch, *_logits(size)) for size, batch in INPUTS.items()}
    search, paper, camvid, whole = inputs
    for size in (search, paper, camvid):
        yield Case("cross entropy", *inputs[size], size)
    for size in (search, camvid):
        yield Case("ohem", *inputs[size], size)
    yield Case("validation", *inputs[camvid], camvid)
    yield Case("argmax", *inputs[whole], whole)
    yield Case("argmax", *inputs[camvid], camvid)
    if part == "full":
        yield Case("cross entropy", *inputs[search], search, labels=torch.int64)
        yield Case("cross entropy", *inputs[search], search, dtype=torch.float32)
        yield Case("cross entropy", 16, CLASSES, at_stride(search, 16), search)
        yield Case("ohem", 8, CLASSES, at_stride(whole, 4), whole)
        yield Case("argmax", *inputs[whole], (1024, 2048))


def _logits(size: Size) -> tuple[int, Size]:
    return CAMVID_CLASSES if size == (360, 480) else CLASSES, at_stride(size, 4)


def make_inputs(case: Case) -> Inputs:
    shape = (case.batch, *case.size, case.classes)
    logits = 3 * torch.randn(shape, device=DEVICE)
    labels = torch.randint(case.classes, (case.batch, *case.full), device=DEVICE)
    labels[torch.rand(labels.shape, device=DEVICE) < 0.05] = 255
    return Inputs(logits.to(case.dtype).movedim(-1, 1), labels.to(case.labels))


def ours(case: Case, i: Inputs, config: CellConfig | None = None) -> tuple[Tensor, ...]:
    """The labels, or the loss and, but for validation, its gradient."""
    if case.kind == "argmax":
        return (upsample_argmax_forward(i.logits, case.full, config=config or ARGMAX),)
    config = config or LOSS
    if case.kind == "ohem":
        loss, sums = upsample_ohem_forward(i.logits, i.labels, THRESHOLD, KEEP, config=config)
    else:
        loss, sums = upsample_cross_entropy_forward(
            i.logits, i.labels, gradient=case.has_gradient, config=config
        )
    if sums is None:
        return (loss,)
    return loss, upsample_loss_backward(sums, torch.ones_like(loss), i.logits)


def stock(case: Case, logits: Tensor, labels: Tensor, in_float32: bool) -> tuple[Tensor, ...]:
    """in_float32: whether logits are resized in float32, or in their own dtype as autocast does."""
    if case.kind == "argmax":
        full = F.interpolate(logits, size=case.full, mode="bilinear", align_corners=True)
        return (full.argmax(1).to(torch.uint8),)
    leaf = logits.detach().requires_grad_(case.has_gradient)
    if case.kind == "ohem":
        loss = hardest_pixels_loss(leaf, labels, THRESHOLD, KEEP, in_float32)
    else:
        loss = resized_cross_entropy(leaf, labels, in_float32)
    return (loss, *torch.autograd.grad(loss, leaf)) if case.has_gradient else (loss,)


def check(case: Case, i: Inputs) -> None:
    results = ours(case, i)
    truths = stock(case, i.logits.double(), i.labels.long(), in_float32=False)
    if case.kind == "argmax":
        if (results[0] != truths[0]).float().mean() > 1e-4:
            raise SystemExit(f"WRONG RESULT: {case}")
        return
    for name, result, truth in zip(("loss", "gradient"), results, truths, strict=False):
        gate(f"{name} {case}", result, truth.detach())


def _stock_binding(case: Case, layout: torch.memory_format, in_float32: bool) -> Binding:
    def bind(i: Inputs) -> Call:
        logits = i.logits.contiguous(memory_format=layout)
        labels = i.labels.long()  # Other integers would be converted in every call.
        return lambda: stock(case, logits, labels, in_float32)

    return bind


def comparisons(part: Part) -> Iterator[Comparison]:
    resizes = {"storage": False, "float32": True}
    for case in cases(part):
        yield Comparison(
            operation=f"upsample {case.kind}",
            case=str(case),
            bytes=case.bytes,
            operations=OPERATIONS[case.kind] * case.pixels * case.classes,
            make=lambda case=case: make_inputs(case),
            check=lambda i, case=case: check(case, i),
            ours=lambda i, case=case: ours(case, i),
            stock={
                f"{layout} {resize}": _stock_binding(case, LAYOUTS[layout], resizes[resize])
                for layout, resize in itertools.product(LAYOUTS, resizes)
            },
            most_sets=3,
        )


KINDS = {f"upsample_{kind.replace(' ', '_')}": kind for kind in ("cross entropy", "ohem", "argmax")}
"""By operation."""
TILES = [
    *(CellConfig(32, rows, 1) for rows in (1, 2, 4, 8)),
    *(CellConfig(64, rows, 2) for rows in (2, 4, 8)),
    CellConfig(128, 4, 4),
]
"""Worth trying; the defaults are among them."""


def key_of(case: Case) -> str:
    return loss_key(case.dtype, (case.batch, case.classes, *case.size), case.full)


def case_of(key: str, kind: str) -> Case:
    def read(dtype: torch.dtype, logits: Any, full: Any) -> Case:
        batch, classes, *size = logits
        return Case(kind, batch, classes, tuple(size), full, dtype=dtype)

    return case_of_key(key, read, key_of)


def sweep(operation: str, key: str) -> Sweep:
    case = case_of(key, KINDS[operation])
    return Sweep(
        operation=operation,
        key=key_of(case),
        bytes=case.bytes,
        make=lambda: make_inputs(case),
        run=lambda i, config: ours(case, i, config),
        configs=[ARGMAX if case.kind == "argmax" else LOSS, *TILES],
    )


FAMILY = Family(
    "final upsampling", comparisons, swept={name: partial(sweep, name) for name in KINDS}
)

if __name__ == "__main__":
    main(FAMILY)
