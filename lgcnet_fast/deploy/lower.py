"""From the steps of a folded network to a plan of fused launches.

Three rules keep maps out of memory:
- A sum and the operations that only it reads become the terms of one node.
- A concatenation is never made: operations are linear in its parts, so each part is a term.
- A resized map is read through its small source, where the reader looks at single pixels. Two
  resizings in a row are one where the first keeps its inputs among its outputs.
Products of a node then move into the node's launch (chain.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lgcnet_fast.data.normalise import MEAN
from lgcnet_fast.deploy.chain import chained
from lgcnet_fast.deploy.operations import (
    Concatenation,
    Constant,
    Convolution,
    DepthwiseSeparableConvolution,
    FoldedOperation,
    InterleavedConvolution,
    MaxPooling,
    PooledConvolution,
    Resizing,
    Size,
    Sum,
    TransposedConvolution,
)
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Buffer, Launch, Plan, Pool, Stem, Term, Tile
from lgcnet_fast.deploy.program import IMAGE, FoldedNetwork, Step, only_read_by_sums
from lgcnet_fast.errors import BackendError

MOST_ELEMENTS = 2**31 - 1
"""Of one map: kernels address its elements with 32 bits."""
MOST_CLASSES = 32
"""Of the fused upsampling and argmax."""
POOL_PROGRAMS = 256
"""That sum the pixels of all bins, about; a GPU of 132 multiprocessors takes no more at once."""
POOL_STRIPS = 32
"""Programs that share the pixels of one bin, at least."""


def lower(network: FoldedNetwork, size: Size, batch: int, packing: Packing) -> Plan:
    """The plan for uint8 or float32 images (batch, *size, 3) in 0..255.

    Raises `BackendError` where the fused kernels cannot serve.
    """
    lowering = _Lowering(network.steps, size, packing)
    for step in network.steps:
        lowering.add(step)
    output = lowering.output()
    plan = Plan(size, batch, packing.dtype, chained(lowering.launches, output, packing), output)
    for buffer in plan.buffers():
        if buffer.elements(batch) > MOST_ELEMENTS:
            raise BackendError(
                f"backend 'triton' cannot serve {batch} images of {size[0]}x{size[1]}: map "
                f"{buffer.name} would have more than 2^31 elements; use smaller batches"
            )
    return plan


@dataclass(frozen=True)
class _Part:
    """Channels of a value: a buffer, seen at `size`."""

    buffer: Buffer
    size: Size

    @property
    def resized(self) -> bool:
        return self.buffer.size != self.size


@dataclass
class _Node:
    """What a sum, or a bare operation, adds up."""

    terms: list[Term]
    biases: list[Tensor]


class _Lowering:
    def __init__(self, steps: Sequence[Step], size: Size, packing: Packing) -> None:
        self.launches: list[Launch] = []
        self._size, self._packing = size, packing
        self._last = steps[-1].name
        self._inlined = only_read_by_sums(steps)
        self._values: dict[str, tuple[_Part, ...]] = {}
        self._pending: dict[str, _Node] = {}
        self._made_larger: dict[_Part, Buffer] = {}

    def output(self) -> Buffer:
        return self._stored(self._only_part(self._last))

    def add(self, step: Step) -> None:
        operation = step.operation
        if isinstance(operation, Concatenation):
            self._values[step.name] = tuple(
                self._at(part, self._size_of(step)) for part in self._parts(step)
            )
        elif isinstance(operation, Resizing):
            target = self._size_of(step)
            parts = tuple(self._at(part, target) for part in self._parts(step))
            self._values[step.name] = parts
        elif isinstance(operation, PooledConvolution):
            self._values[step.name] = (self._pool(step, operation),)
        elif step.inputs == (IMAGE,) and isinstance(operation, Convolution):
            self._values[step.name] = (self._stem(step, operation),)
        elif step.name in self._inlined:
            self._pending[step.name] = self._node(step)
        else:
            self._values[step.name] = (self._tile(step),)

    def _size_of(self, step: Step) -> Size:
        height, width = self._size
        return -(-height // step.stride), -(-width // step.stride)

    def _parts(self, step: Step) -> list[_Part]:
        """Of all inputs, one after another."""
        return [part for name in step.inputs for part in self._values[name]]

    def _at(self, part: _Part, size: Size) -> _Part:
        """The part resized, without an intermediate map if that makes no difference."""
        if part.resized and part.size != size and not _keeps_inputs(part.buffer.size, part.size):
            part = _Part(self._stored(part), part.size)
        return _Part(part.buffer, size)

    def _stored(self, part: _Part) -> Buffer:
        """The part as a map in memory."""
        if not part.resized:
            return part.buffer
        if part not in self._made_larger:
            channels = part.buffer.channels
            out = Buffer(f"{part.buffer.name}/resized", *part.size, channels)
            bias = self._packing.bias((), channels)
            self.launches.append(Tile(out.name, [Term("resized", part.buffer)], bias, out))
            self._made_larger[part] = out
        return self._made_larger[part]

    def _stem(self, step: Step, operation: Convolution) -> _Part:
        if operation.relu_before or operation.weight.shape[-1] != 3 or operation.dilation != 1:
            raise BackendError(f"backend 'triton' cannot serve {step.name} on the image")
        red, green, blue = (255 * mean for mean in MEAN)
        out = Buffer(step.name, *self._size_of(step), len(operation.bias))
        stem = Stem(
            step.name,
            self._packing.stem(operation),
            self._packing.bias((operation.bias,), out.channels),
            (red, green, blue),
            operation.stride,
            operation.relu_after,
            out,
        )
        self.launches.append(stem)
        return _Part(out, out.size)

    def _pool(self, step: Step, operation: PooledConvolution) -> _Part:
        """The small map of means, seen at the size of the step."""
        sources = tuple(self._stored(part) for part in self._parts(step))
        bins, channels = operation.bins, sum(source.channels for source in sources)
        strips = max(POOL_STRIPS, POOL_PROGRAMS // bins**2)
        strips = max(1, min(strips, sources[0].height // bins))
        partial = Buffer(f"{step.name}/sums", bins, bins, channels, strips=strips)
        out = Buffer(step.name, bins, bins, len(operation.bias))
        weight = self._packing.pooled(operation)
        bias = self._packing.bias((operation.bias,), out.channels)
        self.launches.append(Pool(step.name, sources, weight, bias, partial, out))
        return _Part(out, self._size_of(step))

    def _tile(self, step: Step) -> _Part:
        operation, node = step.operation, self._node(step)
        weights = [term.weight for term in node.terms if term.weight is not None]
        if node.biases:
            channels = len(node.biases[0])
        else:
            channels = weights[0].shape[1] if weights else node.terms[0].source.channels
        is_logits = step.name == self._last and channels <= MOST_CLASSES
        out = Buffer(step.name, *self._size_of(step), channels, class_rows=is_logits)
        bias = self._packing.bias(node.biases, channels)
        relu_out = isinstance(operation, Convolution) and operation.relu_after
        self.launches.append(Tile(step.name, node.terms, bias, out, relu_out))
        return _Part(out, out.size)

    def _node(self, step: Step) -> _Node:
        operation = step.operation
        if isinstance(operation, Sum):
            nodes = [self._summand(name) for name in step.inputs]
            return _Node(
                [term for node in nodes for term in node.terms],
                [bias for node in nodes for bias in node.biases],
            )
        if isinstance(operation, Constant):
            return _Node([], [operation.bias])
        terms = list(self._terms(step, operation))
        if isinstance(operation, MaxPooling):
            return _Node(terms, [])
        return _Node(terms, [operation.get_parameter("bias")])

    def _summand(self, name: str) -> _Node:
        if name in self._pending:
            return self._pending.pop(name)
        part = self._only_part(name)
        return _Node([Term("resized" if part.resized else "copy", part.buffer)], [])

    def _only_part(self, name: str) -> _Part:
        parts = self._values[name]
        if len(parts) > 1:
            raise BackendError(f"backend 'triton' takes no concatenation {name} at this place")
        return parts[0]

    def _terms(self, step: Step, operation: FoldedOperation) -> Iterator[Term]:
        """A term for each part of the input."""
        if isinstance(operation, MaxPooling):
            source = self._stored(self._only_part(step.inputs[0]))
            yield Term("pool", source, stride=operation.stride)
            return
        first = 0
        for part in self._parts(step):
            channels = slice(first, first + part.buffer.channels)
            first = channels.stop
            yield self._term(operation, part, channels)

    def _term(self, operation: FoldedOperation, part: _Part, channels: slice) -> Term:
        packing = self._packing
        if isinstance(operation, DepthwiseSeparableConvolution):
            return Term(
                "separable",
                self._stored(part),
                packing.pointwise(operation, channels),
                packing.depthwise(operation, channels),
                operation.stride,
                operation.dilation,
            )
        if isinstance(operation, InterleavedConvolution):
            weight = packing.interleaved(operation, channels)
            return Term("interleaved", self._stored(part), weight, stride=2)
        if isinstance(operation, TransposedConvolution):
            weight = packing.transposed(operation, channels)
            return Term("transposed", self._stored(part), weight, side=3)
        if not isinstance(operation, Convolution):
            raise BackendError(f"backend 'triton' has no {type(operation).__name__}")
        return self._convolution(operation, part, channels)

    def _convolution(self, operation: Convolution, part: _Part, channels: slice) -> Term:
        weight = self._packing.convolution(operation, channels)
        side = operation.weight.shape[-1]
        if side == 1 and operation.stride == 1 and part.resized:
            return Term("resized_product", part.buffer, weight, relu=operation.relu_before)
        return Term(
            "convolution",
            self._stored(part),
            weight,
            stride=operation.stride,
            dilation=operation.dilation,
            side=side,
            relu=operation.relu_before,
        )


def _keeps_inputs(source: Size, target: Size) -> bool:
    """Whether resizing with aligned corners passes through every input, so that between two
    outputs it is linear in each direction, as what resizes it further assumes."""
    return all(
        small == 1 or (large - 1) % (small - 1) == 0
        for small, large in zip(source, target, strict=True)
    )
