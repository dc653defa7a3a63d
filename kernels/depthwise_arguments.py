"""Arguments that the launchers of the depthwise kernels share, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lgcnet_fast.kernels.common import check_dense, check_like, check_map

MAX_BRANCHES = 7
"""Dilations of one launch: they travel as bytes of one signed 64-bit argument."""
Maps = Tensor | Sequence[Tensor]
"""Those of all edges and branches, edge after edge: as one tensor, or a tensor each."""


def pack(dilations: Sequence[int]) -> int:
    """The dilations as the bytes of one integer."""
    return sum(dilation << (8 * branch) for branch, dilation in enumerate(dilations))


def check_arguments(
    x: Tensor, weights: Tensor, dilations: Sequence[int], stride: int
) -> tuple[int, int, int]:
    """(edges, branches, channels); raises `ValueError` naming the argument at fault."""
    check_map("x", x)
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride}, need 1 or 2")
    if not 1 <= len(dilations) <= MAX_BRANCHES:
        raise ValueError(f"dilations: {len(dilations)} of them, need 1 to {MAX_BRANCHES}")
    if any(not 1 <= dilation <= 255 for dilation in dilations):
        raise ValueError(f"dilations: {tuple(dilations)}, each must be 1 to 255")
    if weights.ndim != 5:
        raise ValueError(
            f"weights: shape {tuple(weights.shape)}, need (edges, branches, 3, 3, channels)"
        )
    edges, branches, channels = weights.shape[0], len(dilations), x.shape[1]
    check_dense("weights", weights, (edges, branches, 3, 3, channels), x)
    return edges, branches, channels


def check_dy(
    dy: Maps, x: Tensor, weights: Tensor, stride: int
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The tensors that dy is made of, and the output's (height, width).

    Raises `ValueError` unless dy is like the output for x, or holds all of its maps.
    """
    edges, branches = weights.shape[:2]
    images, channels, height, width = x.shape
    size = (-(-height // stride), -(-width // stride))
    shape: tuple[int, ...] = (edges, branches, images, channels, *size)
    parts = (dy,) if isinstance(dy, Tensor) else tuple(dy)
    if not isinstance(dy, Tensor):
        shape = shape[2:]
        if len(parts) != edges * branches:
            raise ValueError(f"dy: {len(parts)} maps, need {edges * branches}")
    for part in parts:
        check_like("dy", part, shape, x)
        if part.dtype != x.dtype:
            raise ValueError(f"dy: dtype {part.dtype}, but x has {x.dtype}")
        if not part.movedim(-3, -1).is_contiguous():
            raise ValueError(
                f"dy: strides {part.stride()} of shape {shape} are not dense NHWC maps"
            )
    return parts, size
