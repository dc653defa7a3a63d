"""The 1x1 convolution of a concatenation of resized maps, which need not be written for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import fused_concat_pointwise
from lgcnet_fast.ops.backend import Operation
from lgcnet_fast.ops.concat_upsample import Size, check_maps, resize_and_concatenate
from lgcnet_fast.ops.operands import check_beside, check_shape


def concat_upsample_pointwise(
    maps: Sequence[Tensor], size: Size, weight: Tensor, relu: bool = True
) -> Tensor:
    """The convolution of `concat_upsample(maps, size)`, or of its ReLU: (N, C_out, *size).

    maps: (N, C_i, h_i, w_i); weight: (C_out, sum C_i, 1, 1), of the widest of their dtypes. Under
    autocast maps and weight enter the product in its dtype, and the output comes in it.

    Differentiable in maps and weight. The fused form keeps these only: what the backward pass needs
    of the concatenation it computes anew. Triton's kernels never write it, for maps in half
    precision on GPUs of sm_80 and later, and up to 128 output channels; those of the backend `cuda`
    never do for float32 maps, up to 64 of them. Elsewhere it is a product of what the kernels of
    `concat_upsample` write. The reference keeps the concatenation, rectified.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_maps(maps, size)
    channels = sum(x.shape[1] for x in maps)
    if weight.ndim != 4 or not weight.shape[0]:
        shape = tuple(weight.shape)
        raise OperandError(f"weight: shape {shape}, need (c_out, {channels}, 1, 1)")
    check_shape("weight", weight, (weight.shape[0], channels, 1, 1))
    check_beside("weight", weight, "maps[0]", maps[0])
    widest = reduce(torch.promote_types, (x.dtype for x in maps))
    if weight.dtype != widest and not torch.is_autocast_enabled(weight.device.type):
        raise OperandError(f"weight: {weight.dtype}, the maps give {widest}")
    result: Tensor = _operation(tuple(maps), tuple(size), weight, relu)
    return result


def _reference(maps: Sequence[Tensor], size: Size, weight: Tensor, relu: bool) -> Tensor:
    x = resize_and_concatenate(maps, size)
    return F.conv2d(F.relu(x) if relu else x, weight)


_operation = Operation(
    "concat_upsample_pointwise", _reference, **fused_concat_pointwise.CONCAT_UPSAMPLE_POINTWISE
)
