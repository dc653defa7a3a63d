"""From the steps of a folded network to a plan in which every step writes its place at once.

Two rules keep copies out:
- A sum and the operations that only it reads are one launch, which adds one after another to the
  map of the sum.
- What a concatenation joins is written into its channels, by the step that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lgcnet_fast.deploy.native_calls import can_accumulate
from lgcnet_fast.deploy.operations import (
    Concatenation,
    FoldedOperation,
    Resizing,
    Size,
    Sum,
)
from lgcnet_fast.deploy.plan import Buffer, Plan
from lgcnet_fast.deploy.program import IMAGE, FoldedNetwork, Step, only_read_by_sums
from lgcnet_fast.errors import BackendError
from lgcnet_fast.native.upsample_cells import MAX_SIZE


@dataclass(frozen=True, eq=False)
class Addend:
    """An operation and its input, which is the image where there is no source."""

    operation: FoldedOperation
    source: Buffer | None
    reads: tuple[Buffer, ...]
    """What has to be computed before: the parts of a concatenation, or the source."""


@dataclass(frozen=True, eq=False)
class Node:
    """The sum of one or more operations."""

    name: str
    addends: tuple[Addend, ...]
    out: Buffer

    @property
    def reads(self) -> list[Buffer]:
        return [buffer for addend in self.addends for buffer in addend.reads]

    @property
    def writes(self) -> list[Buffer]:
        return [self.out]


def plan_steps(network: FoldedNetwork, size: Size, batch: int, dtype: torch.dtype) -> Plan[Node]:
    """The plan for images (batch, *size, 3). Raises `BackendError` for too large ones."""
    if max(size) > MAX_SIZE:
        raise BackendError(
            f"images of {size[0]}x{size[1]}: backend 'cuda' serves up to {MAX_SIZE} pixels a side; "
            "use the reference"
        )
    planning = _Planning(network.steps, size)
    for step in network.steps:
        planning.add(step)
    return Plan(size, batch, dtype, tuple(planning.nodes), planning.output())


class _Planning:
    def __init__(self, steps: Sequence[Step], size: Size) -> None:
        self.nodes: list[Node] = []
        self._steps = {step.name: step for step in steps}
        self._last, self._size = steps[-1].name, size
        self._channels = _channels(steps)
        self._summands = only_read_by_sums(steps)
        self._in_place: dict[str, Buffer] = {}
        """By step: the channels of a concatenation that it writes."""
        self._joined = {
            step.name: self._joined_parts(step)
            for step in steps
            if isinstance(step.operation, Concatenation)
        }
        self._maps: dict[str, Buffer] = {}

    def output(self) -> Buffer:
        return self._maps[self._last]

    def add(self, step: Step) -> None:
        if step.name in self._joined:
            self._concatenate(step)
        elif step.name not in self._summands:
            out = self._in_place.get(step.name) or self._buffer(step)
            self._maps[step.name] = out
            self._write(self._addends(step), out)

    def _write(self, addends: Sequence[Addend], out: Buffer) -> None:
        # Those that cannot add to a map come first, as the first one of all need not.
        ordered = sorted(addends, key=lambda addend: can_accumulate(addend.operation))
        self.nodes.append(Node(out.name, tuple(ordered), out))

    def _addends(self, step: Step) -> list[Addend]:
        if isinstance(step.operation, Sum):
            return [addend for name in step.inputs for addend in self._summand(name)]
        return [self._addend(step.operation, step.inputs[0])]

    def _summand(self, name: str) -> list[Addend]:
        if name in self._maps:
            return [self._addend(Resizing(), name)]
        return self._addends(self._steps[name])

    def _addend(self, operation: FoldedOperation, source: str) -> Addend:
        if source == IMAGE:
            return Addend(operation, None, ())
        read = self._maps[source]
        return Addend(operation, read, self._joined.get(source, (read,)))

    def _joined_parts(self, step: Step) -> tuple[Buffer, ...]:
        """Slices of a new buffer; the steps that make them shall write them."""
        whole, parts, first = self._buffer(step), [], 0
        for name in step.inputs:
            channels = self._channels[name]
            part = Buffer(name, *whole.size, channels, whole=whole, first=first)
            if self._can_write_in_place(self._steps[name], step.stride):
                self._in_place.setdefault(name, part)
            parts.append(part)
            first += channels
        return tuple(parts)

    def _can_write_in_place(self, step: Step, stride: int) -> bool:
        """A concatenation of concatenations copies."""
        return step.stride == stride and not isinstance(step.operation, Concatenation)

    def _concatenate(self, step: Step) -> None:
        """Copies what could not be written in place."""
        parts = self._joined[step.name]
        for name, part in zip(step.inputs, parts, strict=True):
            if self._maps[name] is not part:
                self._write([self._addend(Resizing(), name)], part)
        self._maps[step.name] = parts[0].memory

    def _buffer(self, step: Step) -> Buffer:
        height, width = (-(-length // step.stride) for length in self._size)
        return Buffer(step.name, height, width, self._channels[step.name])


def _channels(steps: Sequence[Step]) -> dict[str, int]:
    """Of the map of each step."""
    found: dict[str, int] = {}
    for step in steps:
        weights = dict(step.operation.named_parameters())
        if "bias" in weights:
            found[step.name] = len(weights["bias"])
        elif isinstance(step.operation, Concatenation):
            found[step.name] = sum(found[name] for name in step.inputs)
        else:
            found[step.name] = found[step.inputs[0]]
    return found
