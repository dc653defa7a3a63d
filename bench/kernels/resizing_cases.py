"""Concatenation and sum of resized maps: cases, float64 truth and what PyTorch does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import DEVICE, LAYOUTS
from bench.kernels.comparison import Comparison
from bench.kernels.shapes import FUSION_CHANNELS, Size
from bench.kernels.timing import Call, gate

CHANNELS = FUSION_CHANNELS


@dataclass(frozen=True)
class Case:
    """Maps of 48 channels and these sizes, each resized to `size`; side by side or added."""

    batch: int
    sizes: tuple[Size, ...]
    size: Size
    add: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        parts = "+".join(f"{height}x{width}" for height, width in self.sizes)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{CHANNELS}x[{parts}] to {self.size[0]}x{self.size[1]} {dtype}"

    @property
    def out_channels(self) -> int:
        return CHANNELS if self.add else CHANNELS * len(self.sizes)

    @property
    def resized(self) -> tuple[Size, ...]:
        """Sizes of the maps that have a gradient of their own; of a sum, all but a copied one."""
        if not self.add:
            return self.sizes
        return tuple(size for size in self.sizes if size != self.size)

    def bytes(self, backward: bool) -> int:
        sizes = self.resized if backward else self.sizes
        pixels = CHANNELS * sum(height * width for height, width in sizes)
        pixels += self.out_channels * self.size[0] * self.size[1]
        return self.batch * pixels * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    maps: list[Tensor]
    grad: Tensor


Kernel = Callable[[Case, Inputs], Any]


def make_inputs(case: Case) -> Inputs:
    def values(channels: int, size: Size) -> Tensor:
        shape = (case.batch, *size, channels)
        return torch.randn(shape, device=DEVICE, dtype=case.dtype).movedim(-1, 1)

    maps = [values(CHANNELS, size) for size in case.sizes]
    return Inputs(maps, values(case.out_channels, case.size))


def comparisons(case: Case, forward: Kernel, backward: Kernel) -> Iterator[Comparison]:
    """forward gives the output, backward the gradients of the maps with `Case.resized` sizes."""

    def check_forward(i: Inputs) -> None:
        truth = plain(case, [x.double() for x in i.maps])
        gate(f"forward {case}", forward(case, i), truth)

    def check_backward(i: Inputs) -> None:
        leaves = [x.double().requires_grad_() for x in i.maps]
        truths = torch.autograd.grad(plain(case, leaves), leaves, i.grad.double())
        ours = backward(case, i)
        for number, (x_grad, truth) in enumerate(zip(ours, truths[-len(ours) :], strict=True)):
            gate(f"gradient {number} {case}", x_grad, truth)

    name = "sum of resized" if case.add else "concatenation"
    for direction, check, ours, stock in (
        ("forward", check_forward, forward, _stock_forward),
        ("backward", check_backward, backward, _stock_backward),
    ):
        moved = case.bytes(direction == "backward")
        yield Comparison(
            operation=f"{name} {direction}",
            case=str(case),
            bytes=moved,
            operations=8 * moved // case.dtype.itemsize,
            make=lambda: make_inputs(case),
            check=check,
            ours=lambda i, ours=ours: ours(case, i),
            stock={
                name: lambda i, layout=layout, stock=stock: stock(case, i, layout)
                for name, layout in LAYOUTS.items()
            },
        )


def plain(case: Case, maps: Sequence[Tensor]) -> Tensor:
    resized = [
        x
        if tuple(x.shape[2:]) == case.size
        else F.interpolate(x, size=case.size, mode="bilinear", align_corners=True)
        for x in maps
    ]
    if not case.add:
        return torch.cat(resized, dim=1)
    total = resized[0]
    for x in resized[1:]:
        total = total + x
    return total


def _stock_forward(case: Case, i: Inputs, layout: torch.memory_format) -> Call:
    maps = [x.contiguous(memory_format=layout) for x in i.maps]
    return lambda: plain(case, maps)


def _stock_backward(case: Case, i: Inputs, layout: torch.memory_format) -> Call:
    """What autograd runs behind `plain`."""
    grad = i.grad.contiguous(memory_format=layout)

    def run() -> list[Tensor]:
        parts = [grad] * len(case.sizes) if case.add else grad.split(CHANNELS, dim=1)
        return [
            resized_gradient(part, size, case.size)
            for part, size in zip(parts, case.sizes, strict=True)
        ]

    return run


def resized_gradient(grad: Tensor, size: Size, full: Size) -> Tensor:
    """The gradient of a map of `size` from that of its resized form, which may be a copy."""
    if size == full:
        return grad
    return torch.ops.aten.upsample_bilinear2d_backward(grad, full, (*grad.shape[:2], *size), True)
