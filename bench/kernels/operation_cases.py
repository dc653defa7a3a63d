"""The package's operations as networks call them, forward and backward, and their plain twins.

Floors: every tensor that a direction has to read or write, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.device import DEVICE
from bench.kernels.shapes import (
    CLASSES,
    FUSION_CHANNELS,
    INPUTS,
    Shape,
    Size,
    at_stride,
    cell_shapes,
    pyramid,
)
from bench.stock.losses import hardest_pixels_loss, resized_cross_entropy
from bench.stock.networks import resize
from lgcnet_fast import ops

Inputs = list[Tensor]
Outputs = Tensor | Sequence[Tensor]
THRESHOLD, KEEP = 0.7, 1 / 16
DILATIONS = (1, 2, 4, 8)
OPERATIONS = {"upsample_cross_entropy": 11, "upsample_ohem": 18, "upsample_argmax": 4}
"""Arithmetic operations a class and pixel."""


@dataclass(frozen=True)
class OperationCase:
    operation: str
    shape: Shape
    dtype: torch.dtype
    bytes: int
    make: Callable[[], Inputs]
    """The tensors that have gradients come first."""
    differentiable: int
    ours: Callable[[Inputs], Outputs]
    plain: Callable[[Inputs], Outputs]
    flops: int
    """Of both directions; multiply-adds count as two."""
    detail: str = ""
    roundings: float = 4
    """Several lie between inputs and results: limit of the error, in errors of a single one."""
    tuned: bool = True
    """Whether tuning tables have a backend for this operation; else it is that of another one."""

    def __str__(self) -> str:
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{shape} {self.detail}{' ' if self.detail else ''}{dtype}"


def cases(size: Size | None, dtype: torch.dtype) -> Iterator[OperationCase]:
    """Of the maps that an input of this size leads to; of tiny ones for None."""
    if size is None:
        yield from _cell_cases((2, 4, 3, 5), dtype)
        yield from _fusion_cases(2, ((5, 7), (3, 4), (2, 2)), dtype)
        yield from _final_cases(2, (3, 4), (5, 7), torch.float32)
        return
    for shape in cell_shapes(size):
        yield from _cell_cases(shape, dtype)
    yield from _fusion_cases(INPUTS[size], pyramid(size), dtype)
    yield from _final_cases(INPUTS[size], at_stride(size, 4), size, dtype)


def random_map(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """NHWC in memory."""
    values = torch.randn(shape, device=DEVICE, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last)


def _cell_cases(shape: Shape, dtype: torch.dtype) -> Iterator[OperationCase]:
    images, channels, height, width = shape
    elements = torch.Size(shape).numel()
    one = elements * dtype.itemsize
    branches, dilations = 2 * len(DILATIONS), DILATIONS * 2

    def weights() -> Inputs:
        scale = channels**-0.5
        windows = [torch.randn(channels, 1, 3, 3, device=DEVICE) / 3 for _ in range(branches)]
        products = [
            scale * torch.randn(channels, channels, 1, 1, device=DEVICE) for _ in range(branches)
        ]
        return [weight.to(dtype) for weight in (*windows, *products)]

    def separable(i: Inputs) -> list[Tensor]:
        found = ops.separable_branches(
            i[0], i[1 : branches + 1], i[branches + 1 :], DILATIONS, stacks=(1, 3, 1, 3)
        )
        return [x for maps in found for stack in maps for x in _unstacked(stack)]

    def plain_separable(i: Inputs) -> list[Tensor]:
        windows, products = i[1 : branches + 1], i[branches + 1 :]
        return [
            F.conv2d(F.conv2d(F.relu(i[0]), w, None, 1, d, d, channels), p)
            for w, p, d in zip(windows, products, dilations, strict=True)
        ]

    yield OperationCase(
        "separable_branches",
        shape,
        dtype,
        bytes=(3 + 2 * branches) * one,
        make=lambda: [random_map(shape, dtype), *weights()],
        differentiable=1 + 2 * branches,
        ours=separable,
        plain=plain_separable,
        flops=6 * branches * (9 + channels) * elements,
    )

    edges = 2
    yield OperationCase(
        "rectified_convolutions",
        shape,
        dtype,
        bytes=(3 + 2 * edges) * one,
        make=lambda: [
            random_map(shape, dtype),
            *(
                (torch.randn(channels, channels, 3, 3, device=DEVICE) / (9 * channels) ** 0.5)
                .to(dtype)
                .contiguous(memory_format=torch.channels_last)
                for _ in range(edges)
            ),
        ],
        differentiable=1 + edges,
        ours=lambda i: ops.rectified_convolutions(i[0], i[1:]),
        plain=lambda i: [F.conv2d(F.relu(i[0]), weight, padding=1) for weight in i[1:]],
        flops=54 * edges * channels * elements,
        tuned=False,
    )

    for count, skips in ((18, 3),):
        norms = [nn.BatchNorm2d(channels, affine=False).to(DEVICE) for _ in range(count)]
        yield OperationCase(
            "mixed_norm_sum",
            shape,
            dtype,
            bytes=(5 * count + 3 * skips + 3) * one,
            make=lambda count=count, skips=skips: [
                *(random_map(shape, dtype) for _ in range(count + skips)),
                torch.rand(count + skips, device=DEVICE),
            ],
            differentiable=count + skips + 1,
            ours=lambda i, norms=norms, skips=skips: ops.mixed_norm_sum(
                i[:-1], i[-1], [*norms, *[None] * skips]
            ),
            plain=lambda i, count=count: _plain_mixed_sum(i, count),
            flops=(14 * count + 6 * skips) * elements,
            detail=f"K{count} J{skips}",
        )

    yield OperationCase(
        "max_pool",
        shape,
        dtype,
        bytes=5 * one,
        make=lambda: [random_map(shape, dtype)],
        differentiable=1,
        ours=lambda i: ops.max_pool(i[0]),
        plain=lambda i: F.max_pool2d(i[0], 3, 1, padding=1),
        flops=18 * elements,
    )


def _unstacked(stack: Tensor) -> Sequence[Tensor]:
    return stack.unbind() if stack.ndim == 5 else (stack,)


def _plain_mixed_sum(i: Inputs, count: int) -> Tensor:
    maps, z = i[:-1], i[-1].to(i[0].dtype).unbind()
    total = z[0] * F.batch_norm(maps[0], None, None, training=True)
    for weight, y in zip(z[1:count], maps[1:count], strict=True):
        total = total + weight * F.batch_norm(y, None, None, training=True)
    for weight, x in zip(z[count:], maps[count:], strict=True):
        total = total + weight * x
    return total


def _fusion_cases(
    batch: int, sizes: tuple[Size, Size, Size], dtype: torch.dtype
) -> Iterator[OperationCase]:
    fine, middle, coarse = sizes
    forms: dict[str, tuple[tuple[Size, ...], Any, Any]] = {
        "upsample": (
            (middle,),
            lambda i: ops.upsample(i[0], fine),
            lambda i: resize(i[0], fine),
        ),
        "concat_upsample": (
            (fine, middle, middle),
            lambda i: ops.concat_upsample(i, fine),
            lambda i: torch.cat([resize(x, fine) for x in i], 1),
        ),
        "sum_upsample": (
            (fine, middle, coarse),
            lambda i: ops.sum_upsample(i, fine),
            lambda i: sum(resize(x, fine) for x in i[1:]) + i[0],
        ),
    }
    for name, (parts, ours, plain) in forms.items():
        pixels = sum(height * width for height, width in parts)
        outputs = len(parts) if name == "concat_upsample" else 1
        pixels += outputs * fine[0] * fine[1]
        yield OperationCase(
            name,
            (batch, FUSION_CHANNELS, *fine),
            dtype,
            bytes=2 * batch * FUSION_CHANNELS * pixels * dtype.itemsize,
            make=lambda parts=parts: [
                random_map((batch, FUSION_CHANNELS, *part), dtype) for part in parts
            ],
            differentiable=len(parts),
            ours=ours,
            plain=plain,
            flops=16 * batch * FUSION_CHANNELS * outputs * fine[0] * fine[1],
        )
    yield _join_case(batch, fine, dtype)


def _join_case(batch: int, size: Size, dtype: torch.dtype) -> OperationCase:
    """Three maps of one size, as the fusion cell joins them."""
    parts, shape = 3, (batch, FUSION_CHANNELS, *size)
    channels = parts * FUSION_CHANNELS
    elements = torch.Size(shape).numel()
    return OperationCase(
        "concat_upsample_pointwise",
        shape,
        dtype,
        # Forward the maps and the output, backward the maps, their gradients and the output's.
        bytes=(3 * parts + 2) * elements * dtype.itemsize,
        make=lambda: [
            *(random_map(shape, dtype) for _ in range(parts)),
            (torch.randn(FUSION_CHANNELS, channels, 1, 1, device=DEVICE) / channels**0.5).to(dtype),
        ],
        differentiable=parts + 1,
        ours=lambda i: ops.concat_upsample_pointwise(i[:-1], size, i[-1]),
        plain=lambda i: F.conv2d(F.relu(torch.cat(i[:-1], 1)), i[-1]),
        flops=6 * channels * elements,
    )


def _final_cases(batch: int, size: Size, full: Size, dtype: torch.dtype) -> Iterator[OperationCase]:
    shape = (batch, CLASSES, *size)

    def make() -> Inputs:
        labels = torch.randint(CLASSES, (batch, *full), device=DEVICE)
        labels[torch.rand(labels.shape, device=DEVICE) < 0.05] = 255
        return [3 * random_map(shape, dtype), labels]

    logits, labels = torch.Size(shape).numel() * dtype.itemsize, batch * full[0] * full[1]
    forms: dict[str, tuple[int, Any, Any]] = {
        "upsample_cross_entropy": (
            1,
            lambda i: ops.upsample_cross_entropy(*i),
            lambda i: resized_cross_entropy(*i),
        ),
        "upsample_ohem": (
            1,
            lambda i: ops.upsample_ohem(*i, THRESHOLD, KEEP),
            lambda i: hardest_pixels_loss(*i, THRESHOLD, KEEP),
        ),
        "upsample_argmax": (
            0,
            lambda i: ops.upsample_argmax(i[0], full),
            lambda i: resize(i[0], full).argmax(1).to(torch.uint8),
        ),
    }
    for name, (differentiable, ours, plain) in forms.items():
        yield OperationCase(
            name,
            shape,
            dtype,
            bytes=(1 + differentiable) * logits + (8 if differentiable else 1) * labels,
            make=make,
            differentiable=differentiable,
            ours=ours,
            plain=plain,
            flops=OPERATIONS[name] * CLASSES * labels,
            detail=f"to {full[0]}x{full[1]}",
            # Rounding decides whether a pixel at the threshold is hard.
            roundings=100 if name == "upsample_ohem" else 4,
        )
