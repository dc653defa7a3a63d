"""What a training step is measured on, and who takes part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.device import DEVICE
from lgcnet_fast.train.capture import CapturedStep, CudaRecorder

OURS = tuple(f"ours-{backend}" for backend in ("auto", "triton", "cuda", "reference"))
LAYOUTS = ("nchw", "nhwc")
KINDS = ("eager", "graph", "compiled")
"""compiled: torch.compile per cell, then one CUDA graph of the whole step."""
STOCK = tuple(f"{kind}-{layout}" for kind in KINDS for layout in LAYOUTS)
CLASSES = 19

Batch = tuple[Tensor, Tensor]
Step = Callable[[], Tensor]
"""One optimiser step; returns the loss, on the device."""


@dataclass(frozen=True)
class TrainingCase:
    batch: int
    size: tuple[int, int]
    precision: str
    """fp32, bf16 or fp16, of autocast."""
    space: dict[str, Any] = field(default_factory=dict)
    """Options of LGCNet."""
    genotype: str = ""
    """Of finetuning: `reference`, or `random-N`."""
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))  # JSON makes it a list

    def __str__(self) -> str:
        height, width = self.size
        widths = "/".join(map(str, self.space.get("widths", ())))
        parts = [f"{self.batch} x {height}x{width}", self.precision, widths, self.genotype]
        return " ".join(part for part in parts if part)

    def with_precision(self, precision: str) -> TrainingCase:
        return replace(self, precision=precision)

    def shrunk(self, batch: int, size: tuple[int, int]) -> TrainingCase:
        """With at most this batch and size."""
        height, width = (min(pair) for pair in zip(self.size, size, strict=True))
        return replace(self, batch=min(self.batch, batch), size=(height, width))

    def data(self) -> Batch:
        """Images (N, 3, H, W) and int64 labels (N, H, W), 5 % of them ignored, on the device."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, *self.size, generator=generator)
        labels = torch.randint(CLASSES, (self.batch, *self.size), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.05] = 255
        return images.to(DEVICE), labels.to(DEVICE)


def autocast(precision: str) -> torch.autocast:
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is not None)


def as_graph(
    name: str, step: Callable[[Any], Any], batch: Batch, generators: tuple[torch.Generator, ...]
) -> Callable[[], Any]:
    """`step([batch])` recorded as a CUDA graph; without a GPU, as it is."""
    if DEVICE.type != "cuda":
        return lambda: step([batch])
    recorded = CapturedStep(name, step, CudaRecorder(DEVICE, generators))
    return lambda: recorded([batch])
