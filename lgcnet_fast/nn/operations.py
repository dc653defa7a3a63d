"""Candidate operations of cells (LGCNet Table II), fusion cell and up-sampling edges."""

from __future__ import annotations

from torch import nn

from lgcnet_fast.nn.primitives import (
    Deconvolution,
    DepthwiseSeparable,
    FactorizedReduce,
    GlobalPool,
    Interpolate,
    PoolBN,
    ReLUConvBN,
    SeparablePair,
)

CELL_OPS = ("max3", "skip", "conv3", "none", "sep3", "dil3_2", "dil3_4", "dil3_8")
FUSION_OPS = (
    "conv1",
    "conv3",
    "sep3",
    "dil3_2",
    "dil3_4",
    "dil3_8",
    "dil3_12",
    "gp1",
    "gp2",
    "gp5",
)
UP_OPS = ("deconv", "interp")

LIGHT_OPS = frozenset({"none", "max3", "skip"})
"""Cell operations without a convolution at stride 1."""


def cell_operation(
    name: str, channels: int, stride: int = 1, affine: bool = True, pool_norm: bool = False
) -> nn.Module | None:
    """A cell's candidate: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).

    None for `none`, which is not computed at all. `pool_norm` adds the batch norm that `max3` has
    during the search, where it makes candidates comparable; the derived network drops it.
    """
    if name == "none":
        return None
    if name == "skip":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)
    if name == "max3":
        if pool_norm:
            return PoolBN(channels, stride, affine)
        return nn.MaxPool2d(3, stride=stride, padding=1)
    if name == "conv3":
        return ReLUConvBN(channels, channels, kernel=3, stride=stride, affine=affine)
    if name == "sep3":
        return SeparablePair(channels, stride, affine)
    if name in CELL_OPS:
        return DepthwiseSeparable(channels, channels, stride, _suffix(name, "dil3_"), affine)
    raise ValueError(f"unknown cell operation {name!r}; one of {', '.join(CELL_OPS)}")


def fusion_operation(name: str, c_in: int, c_out: int, affine: bool = True) -> nn.Module:
    """A fusion cell's candidate at stride 1: (N, c_in, H, W) -> (N, c_out, H, W).

    Every one contains a convolution, so that each maps a concatenation back to `c_out`. `sep3` is
    applied once here, not twice as in cells, because stride-4 maps are large.
    """
    if name not in FUSION_OPS:
        raise ValueError(f"unknown fusion operation {name!r}; one of {', '.join(FUSION_OPS)}")
    if name in ("conv1", "conv3"):
        return ReLUConvBN(c_in, c_out, kernel=_suffix(name, "conv"), affine=affine)
    if name == "sep3":
        return DepthwiseSeparable(c_in, c_out, affine=affine)
    if name.startswith("dil3_"):
        dilation = _suffix(name, "dil3_")
        return DepthwiseSeparable(c_in, c_out, dilation=dilation, affine=affine)
    return GlobalPool(c_in, c_out, _suffix(name, "gp"), affine)


def up_operation(name: str, channels: int, affine: bool = True) -> nn.Module:
    """An up-sampling candidate, called with (x, size): one level finer, same channels."""
    if name == "interp":
        return Interpolate()
    if name == "deconv":
        return Deconvolution(channels, affine)
    raise ValueError(f"unknown up-sampling operation {name!r}; one of {', '.join(UP_OPS)}")


def _suffix(name: str, prefix: str) -> int:
    return int(name.removeprefix(prefix))
