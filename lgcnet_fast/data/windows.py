"""From uint8 sources straight to crops of one size, with one resampling a batch.

A window says which part of its source a crop shows; scale, crop, padding and flip are all in it.
Only the pixels under a window leave the uint8 source. Sampling positions are separable (there is
no rotation), so they are one vector for rows and one for columns, made on the CPU: the GPU never
waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.data.classes import IGNORE
from lgcnet_fast.data.normalise import mean_colour


@dataclass(frozen=True)
class Window:
    """A rectangle in source pixels, which may reach beyond the source."""

    top: float
    left: float
    height: float
    width: float
    flip: bool = False


@dataclass(frozen=True)
class Axis:
    """Where the rows, or the columns, of a batch of crops lie."""

    positions: Tensor
    """float32 (B, n): place in the staged pixels, whose centres are at .5."""
    inside: Tensor
    """bool (B, n): False where the crop is beyond its source."""


@dataclass(frozen=True)
class Staged:
    """The source pixels that a batch of crops needs."""

    images: Tensor
    """uint8 (B, H, W, 3); each sample fills its upper left part."""
    labels: Tensor | None
    """uint8 (B, H, W)"""
    rows: Axis
    columns: Axis
    padded: bool
    """Whether any crop reaches beyond its source."""

    def to(self, device: torch.device) -> Staged:
        """On the device; asynchronous from pinned memory."""
        return Staged(
            self.images.to(device, non_blocking=True),
            None if self.labels is None else self.labels.to(device, non_blocking=True),
            _axis_to(self.rows, device),
            _axis_to(self.columns, device),
            self.padded,
        )


@dataclass(frozen=True)
class _Span:
    """The pixels start..stop of a source of `length`, along one axis."""

    start: int
    stop: int
    length: int

    @classmethod
    def under(cls, start: float, extent: float, length: int) -> _Span:
        """What a window covers, and the neighbours that interpolation reads."""
        return cls(
            max(0, math.floor(start) - 1), min(length, math.ceil(start + extent) + 1), length
        )

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


def stage(
    images: Sequence[Tensor],
    labels: Sequence[Tensor] | None,
    windows: Sequence[Window],
    crop: tuple[int, int],
    pin: bool = False,
) -> Staged:
    """Copies what the windows cover into one batch.

    Images are uint8 (H, W, 3) and labels uint8 (H, W), of any sizes; every window must touch its
    image. The batch lies in pinned memory with `pin`, else on the device of the first image.
    """
    vertical = [
        _Span.under(w.top, w.height, image.shape[0])
        for w, image in zip(windows, images, strict=True)
    ]
    horizontal = [
        _Span.under(w.left, w.width, image.shape[1])
        for w, image in zip(windows, images, strict=True)
    ]
    rows = _axis([(w.top, w.height, False) for w in windows], vertical, crop[0])
    columns = _axis([(w.left, w.width, w.flip) for w in windows], horizontal, crop[1])
    padded = not bool(rows.inside.all() and columns.inside.all())
    if pin:
        rows, columns = _pinned(rows), _pinned(columns)
    return Staged(
        _gather(images, vertical, horizontal, pin),
        None if labels is None else _gather(labels, vertical, horizontal, pin),
        rows,
        columns,
        padded,
    )


def render(staged: Staged) -> tuple[Tensor, Tensor | None]:
    """The crops, on the device of the staged pixels.

    Images float32 (B, 3, h, w) in 0..255, bilinear, the mean colour where padded; labels int64
    (B, h, w), nearest, 255 where padded.
    """
    outside = None
    if staged.padded:
        outside = ~(staged.rows.inside[:, :, None] & staged.columns.inside[:, None, :])
    images = _bilinear(staged)
    if outside is not None:
        images = torch.where(outside[:, None], mean_colour(images.device), images)
    if staged.labels is None:
        return images, None
    labels = _nearest(staged.labels, staged)
    if outside is not None:
        labels = labels.masked_fill(outside, IGNORE)
    return images, labels.long()


def _bilinear(staged: Staged) -> Tensor:
    sources = staged.images.permute(0, 3, 1, 2).float()
    height, width = sources.shape[2:]
    y = staged.rows.positions * (2 / height) - 1
    x = staged.columns.positions * (2 / width) - 1
    # Not affine_grid: its matrix product would run in reduced precision where that is allowed.
    grid = torch.stack(
        torch.broadcast_tensors(x[:, None, :], y[:, :, None]),
        dim=-1,
    )
    return F.grid_sample(sources, grid, mode="bilinear", align_corners=False)


def _nearest(labels: Tensor, staged: Staged) -> Tensor:
    sample = torch.arange(len(labels), device=labels.device)[:, None, None]
    rows, columns = staged.rows.positions.long(), staged.columns.positions.long()
    return labels[sample, rows[:, :, None], columns[:, None, :]]


def _gather(
    sources: Sequence[Tensor], vertical: list[_Span], horizontal: list[_Span], pin: bool
) -> Tensor:
    """uint8 (B, H, W, ...): each source's span in the upper left part of its sample."""
    # One pixel of margin, zeroed where it borders a sample: interpolation reads it at weight 0.
    height, width = max(map(len, vertical)) + 1, max(map(len, horizontal)) + 1
    shape = (len(sources), height, width, *sources[0].shape[2:])
    device = torch.device("cpu") if pin else sources[0].device
    batch = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pin)
    for part, source, rows, columns in zip(batch, sources, vertical, horizontal, strict=True):
        part[: len(rows), : len(columns)] = source[rows.slice, columns.slice]
        part[len(rows)] = 0
        part[: len(rows), len(columns)] = 0
    return batch


def _axis(windows: list[tuple[float, float, bool]], spans: list[_Span], count: int) -> Axis:
    """Positions of `count` rows or columns from (start, extent, flip) of every window."""
    start, extent, flip = torch.tensor(windows, dtype=torch.float64).T[:, :, None]
    first, length = torch.tensor([(s.start, s.length) for s in spans]).T[:, :, None]
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    share = torch.where(flip.bool(), 1 - share, share)
    positions = start + extent * share
    inside = (positions >= 0) & (positions < length)
    # Repeats the edge pixel, so that what lies beside the staged pixels is never seen.
    clamped = positions.clamp(min=0.5).minimum(length - 0.5) - first
    return Axis(clamped.float(), inside)


def _axis_to(axis: Axis, device: torch.device) -> Axis:
    return Axis(
        axis.positions.to(device, non_blocking=True), axis.inside.to(device, non_blocking=True)
    )


def _pinned(axis: Axis) -> Axis:
    return Axis(axis.positions.pin_memory(), axis.inside.pin_memory())
