"""3x3 convolutions of stride 2 of one map: the fused form takes all of them in one launch, their
gradients of the map, summed, in another, and those of the weights in a third."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.conv3_stride2_kernels import (
    GEOMETRY,
    strided_convolutions_forward,
    strided_weight_gradients,
    transposed_convolutions,
)
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.convolutions_of_a_map import (
    Launches,
    check_convolutions,
    convolutions_of_a_map,
)
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal


def strided_convolutions(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """(N, C, H, W) -> (N, C_out, ceil(H / 2), ceil(W / 2)) with every weight, without bias.

    weights: (C_out, C, 3, 3), all of one shape. Also under autocast. Differentiable; keeps x and
    the weights.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_convolutions(x, weights)
    result: list[Tensor] = _operation(x, tuple(weights))
    return result


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether the backend `triton` has a fused form for maps like x, before autocast."""
    from lgcnet_fast.kernels.conv3_stride2 import fits

    return fits(x.new_empty(0, dtype=computed_dtype(x)), weight)


def _reference(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [F.conv2d(x, weight, None, *GEOMETRY) for weight in weights]


def _apart(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return convolutions([x] * len(weights), weights, [Geometry(*GEOMETRY)] * len(weights))


def _run(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    if not fuses(x, weights[0]):
        return _apart(x, weights)
    return convolutions_of_a_map(_LAUNCHES, x, weights)


def _map_gradient(gs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return transposed_convolutions(gs, weights, x.shape[2:])


_LAUNCHES = Launches(strided_convolutions_forward, _map_gradient, strided_weight_gradients)

_operation = Operation(
    "strided_convolutions",
    _reference,
    triton=Implementation(_run, lambda x, weights: dtype_refusal("x", x)),
    cuda=Implementation(_apart, lambda x, weights: dtype_refusal("x", x)),
    tuned_as="separable_branches",
)
