"""Plans: a folded network at one input size as a short list of fused launches.

A launch reads and writes buffers, NHWC maps of a batch. Launches come in an order that can be
computed; which of them may overlap follows from what they read (see arena.py). A plan holds no
memory of its own beyond its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lgcnet_fast.deploy.operations import Size
from lgcnet_fast.ops.tuning import shape_key


@dataclass(eq=False)
class Buffer:
    """A map (batch, height, width, channels); `class_rows`: laid out as the argmax reads it."""

    name: str
    height: int
    width: int
    channels: int
    class_rows: bool = False
    strips: int = 0
    """Of partial sums of a pooling, (batch, height x width, strips, channels) in float32."""
    whole: Buffer | None = None
    """The buffer that this one is a slice of; it has no memory of its own then."""
    first: int = 0
    """Its first channel there."""

    @property
    def memory(self) -> Buffer:
        return self.whole or self

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def pitch(self) -> int:
        """Elements from pixel to pixel, 16 bytes' worth; of class rows, from class to class."""
        if self.class_rows:
            return _rounded_up(self.width, 32)
        return _rounded_up(self.channels, 8)

    @property
    def is_float32(self) -> bool:
        """Whatever the storage dtype of the maps."""
        return self.class_rows or self.strips > 0

    def elements(self, batch: int) -> int:
        if self.class_rows:
            return batch * self.height * self.channels * self.pitch
        if self.strips:
            return batch * self.height * self.width * self.strips * self.channels
        return batch * self.height * self.width * self.pitch


@dataclass(eq=False)
class Term:
    """What one map adds to a node; the kinds are those of kernels/infer_terms.py.

    weight: (taps * c_in, c_out) in the storage dtype; depthwise: (9, c_in) float32.
    """

    kind: str
    source: Buffer
    weight: Tensor | None = None
    depthwise: Tensor | None = None
    stride: int = 1
    dilation: int = 1
    side: int = 1
    relu: bool = True

    @property
    def text(self) -> str:
        """`separable 64 /2 d4`: kind, input channels, stride and dilation unless 1."""
        stride = f" /{self.stride}" if self.stride > 1 else ""
        dilation = f" d{self.dilation}" if self.dilation > 1 else ""
        window = "3" if self.kind == "convolution" and self.side == 3 else ""
        return f"{self.kind}{window} {self.source.channels}{stride}{dilation}"

    @property
    def is_pointwise(self) -> bool:
        return self.kind == "convolution" and self.side == 1 and self.stride == 1


@dataclass(eq=False)
class Product:
    """A 1x1 convolution of the ReLU of a node and of other maps of its size.

    weight: (channels of node and parts, c_out), the node's first; bias: (c_out,) float32.
    """

    name: str
    parts: tuple[Buffer, ...]
    weight: Tensor
    bias: Tensor
    out: Buffer


@dataclass(eq=False)
class Tile:
    """A node, the sum of its terms and bias (float32), and products of it."""

    name: str
    terms: list[Term]
    bias: Tensor
    out: Buffer
    relu_out: bool = False
    stored: bool = True
    products: list[Product] = field(default_factory=list)

    @property
    def reads(self) -> list[Buffer]:
        parts = (part for product in self.products for part in product.parts)
        return [*(term.source for term in self.terms), *parts]

    @property
    def writes(self) -> list[Buffer]:
        return [*([self.out] if self.stored else []), *(product.out for product in self.products)]


@dataclass(eq=False)
class Stem:
    """The first convolution; weight: (27, c_out) float32 for pixels of 0..255 less their mean."""

    name: str
    weight: Tensor
    bias: Tensor
    mean: tuple[float, float, float]
    stride: int
    relu: bool
    out: Buffer

    @property
    def reads(self) -> list[Buffer]:
        return []

    @property
    def writes(self) -> list[Buffer]:
        return [self.out]


@dataclass(eq=False)
class Pool:
    """Means over a grid of bins of the ReLU of maps, and their 1x1 convolution.

    weight: (channels of the sources, c_out) float32; partial: sums of strips of rows.
    """

    name: str
    sources: tuple[Buffer, ...]
    weight: Tensor
    bias: Tensor
    partial: Buffer
    out: Buffer

    @property
    def reads(self) -> list[Buffer]:
        return list(self.sources)

    @property
    def writes(self) -> list[Buffer]:
        return [self.partial, self.out]


Launch = Tile | Stem | Pool


class Access(Protocol):
    """What the order of launches and the sharing of memory depend on."""

    @property
    def reads(self) -> list[Buffer]: ...
    @property
    def writes(self) -> list[Buffer]: ...


AnyLaunch = TypeVar("AnyLaunch", bound=Access)


@dataclass(frozen=True, eq=False)
class Plan(Generic[AnyLaunch]):
    size: Size
    """(height, width) of the image."""
    batch: int
    dtype: torch.dtype
    """Of the maps in memory."""
    launches: tuple[AnyLaunch, ...]
    output: Buffer
    """The logits."""

    def buffers(self) -> list[Buffer]:
        """Those with memory of their own, in the order in which they are written."""
        written = (buffer for launch in self.launches for buffer in launch.writes)
        return list(dict.fromkeys(buffer.memory for buffer in written))

    def key_of(self, tile: Tile) -> str:
        """What decides the best tile of a launch, as tuning tables name it.

        `float16 1x49x97 128: separable 128, copy 128 -> 128 256`: the node's channels, its terms
        with their input channels, and the channels of its products.
        """
        shape = shape_key(self.dtype, (self.batch, *tile.out.size))
        terms = ", ".join(term.text for term in tile.terms)
        products = " ".join(str(product.out.channels) for product in tile.products)
        return f"{shape} {tile.out.channels}: {terms}{' -> ' if products else ''}{products}"

    def bytes_of(self, buffer: Buffer) -> int:
        itemsize = 4 if buffer.is_float32 else self.dtype.itemsize
        return buffer.elements(self.batch) * itemsize


def producers(launches: Sequence[Access]) -> dict[Buffer, int]:
    """For each buffer the index of the launch that writes it."""
    return {out: index for index, launch in enumerate(launches) for out in launch.writes}


def dependencies(launches: Sequence[Access]) -> Iterator[set[int]]:
    """For each launch the launches whose results it reads."""
    made_by = producers(launches)
    for launch in launches:
        yield {made_by[buffer] for buffer in launch.reads}


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
