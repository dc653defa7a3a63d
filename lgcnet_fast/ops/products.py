"""Depthwise maps that a node sums as they are: their pointwise products are never made.

A sum of products z_k r_k (P_k d_k - mean_k) is itself one product of the maps d_k, and the
statistics of P_k d_k follow from the mean and the covariance of d_k. See docs/mixed_node.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from lgcnet_fast.ops.backend import supposing
from lgcnet_fast.ops.maps import computed_dtype

T = TypeVar("T")
WIDEST = 128
"""Channels of maps that are left to the node: beyond, programs hold parts of their matrices."""
SMALLEST = 2**21
"""Values of such a map, 4 MB in 16 bits."""


@dataclass(frozen=True)
class Products:
    """`weights[b] maps[b]` of every branch b, not multiplied out: an entry of `mixed_norm_sum`."""

    maps: Tensor
    """(B, N, C, H, W)."""
    weights: Sequence[Tensor]
    """B of them, (C_out, C, 1, 1); under autocast they enter the products in its dtype."""

    def multiplied(self) -> list[Tensor]:
        """The raw maps (N, C_out, H, W) themselves."""
        return [F.conv2d(d, weight) for d, weight in zip(self.maps, self.weights, strict=True)]

    def like(self) -> Tensor:
        """Of the shape, dtype and device that a stack of the raw maps has; its values are none."""
        return self.maps.detach()[:, :, :1].expand(-1, -1, len(self.weights[0]), -1, -1)


Entry = Tensor | Products
"""A map (N, C, H, W), a stack (B, N, C, H, W) of them, or products."""


class Group(NamedTuple):
    """Entries of a node that it sums alike, in the order of their weights."""

    entries: list[Any]
    norms: list[Any]
    options: list[int]


def grouped(
    entries: Sequence[Entry], norms: Sequence[nn.Module | None], options: Sequence[int]
) -> tuple[Group, Group, Group]:
    """Products, normalised maps and plain ones; norms, options: of each map in order."""
    every = zip(with_own(entries, norms), with_own(entries, options), strict=True)
    groups = (Group([], [], []), Group([], [], []), Group([], [], []))
    for (entry, own), (_, picked) in sorted(every, key=lambda one: one[1][1][0]):
        kind = 0 if isinstance(entry, Products) else 1 if own[0] is not None else 2
        groups[kind].entries.append(entry)
        groups[kind].norms.extend(own)
        groups[kind].options.extend(picked)
    return groups


def with_own(entries: Sequence[Entry], values: Sequence[T]) -> Iterator[tuple[Any, Sequence[T]]]:
    """Each entry with the values of its maps."""
    first = 0
    for entry in entries:
        maps = entry.maps if isinstance(entry, Products) else entry
        count = len(maps) if maps.ndim == 5 else 1
        yield entry, values[first : first + count]
        first += count


def likenesses(entries: Sequence[Entry]) -> list[Tensor]:
    """Maps and stacks only, of which but the shapes, dtypes and devices count."""
    return [entry.like() if isinstance(entry, Products) else entry for entry in entries]


def multiplied(entries: Sequence[Entry]) -> list[Tensor]:
    """Maps and stacks only."""
    return [
        y
        for entry in entries
        for y in (entry.multiplied() if isinstance(entry, Products) else (entry,))
    ]


def pay(x: Tensor, out_channels: int, stride: int = 1) -> bool:
    """Whether the backend `triton` had better leave products of maps like x to the node.

    x: (N, C, H, W) or a stack, before autocast; the depthwise maps are made with this stride. The
    products of a node cost it small kernels and shares of sums, whatever the size of the maps, and
    spare six passes over each of them. On an H200 (docs/mixed_node.md has the figures) this pays
    for 8 maps and more of 2^21 values each, and loses for 2^20. Wider maps than their products
    would take more memory until the backward pass, and as long to read twice as to multiply out.
    """
    *_, images, channels, height, width = x.shape
    values = images * channels * (-(-height // stride)) * (-(-width // stride))
    dtype = computed_dtype(x)
    if not channels <= out_channels <= WIDEST or values < SMALLEST:
        return False
    if supposing():  # The device need not exist: one with matrix units.
        return dtype.itemsize == 2
    from lgcnet_fast.kernels.product_sum import serves

    return serves(x.new_empty(0, channels, 1, 1, dtype=dtype), out_channels)
