"""Folded networks: a list of steps, each one operation on maps that earlier steps have made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lgcnet_fast.deploy.operations import FoldedOperation, Sum

IMAGE = "image"
"""Name of the network's input."""


@dataclass(frozen=True)
class Step:
    """Makes the map `name`; a kernel takes over by replacing the operation."""

    name: str
    operation: FoldedOperation
    inputs: tuple[str, ...]
    stride: int
    """Of the map: an image of height n gives it ceil(n / stride) rows, the width likewise."""


class FoldedNetwork(nn.Module):
    """Normalised images (N, 3, H, W) to logits (N, classes, ceil(H / output_stride), ...).

    Of `steps`, which come in an order that can be computed, only those stay that the last one
    depends on. A map is released after the last step that reads it.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = _needed(steps)
        self.output_stride = steps[-1].stride
        self.operations = nn.ModuleDict({step.name: step.operation for step in self.steps})
        self._released = _last_reads(self.steps)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        maps = {IMAGE: image}
        for step, released in zip(self.steps, self._released, strict=True):
            # Rounded up as convolutions do it, so that traced programs know both sizes are one.
            size = ((height - 1) // step.stride + 1, (width - 1) // step.stride + 1)
            operation = self.operations[step.name]
            maps[step.name] = operation([maps[name] for name in step.inputs], size)
            for name in released:
                del maps[name]
        return maps[self.steps[-1].name]


def only_read_by_sums(steps: Sequence[Step]) -> set[str]:
    """Maps whose one reader is a sum, which reads them once: they need not exist."""
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.inputs:
            readers.setdefault(name, []).append(step)
    return {
        name
        for name, read_by in readers.items()
        if len(read_by) == 1 and isinstance(read_by[0].operation, Sum)
    }


def _needed(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps that the last one depends on, in their order."""
    read = {steps[-1].name}
    kept = []
    for step in reversed(steps):
        if step.name in read:
            kept.append(step)
            read.update(step.inputs)
    return tuple(reversed(kept))


def _last_reads(steps: Sequence[Step]) -> tuple[tuple[str, ...], ...]:
    """For each step the maps that no later step reads."""
    unread = {steps[-1].name}
    released = []
    for step in reversed(steps):
        released.append(tuple(sorted(set(step.inputs) - unread)))
        unread.update(step.inputs)
    return tuple(reversed(released))
