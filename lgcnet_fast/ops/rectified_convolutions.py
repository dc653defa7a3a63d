"""3x3 convolutions of the ReLU of a map that several of them read.

The fused form takes all of them in one launch, which rectifies what it loads, and their gradients
of the map in another, summed and masked: relu(x) is never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.ops.backend import Implementation, Operation, supposing
from lgcnet_fast.ops.conv3_kernels import (
    conv3_input_gradient,
    conv3_results,
    conv3_weight_gradients,
)
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.convolutions_of_a_map import (
    Launches,
    check_convolutions,
    convolutions_of_a_map,
)
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal

GEOMETRY = Geometry(1, 1)


def rectified_convolutions(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The convolution of relu(x) with every weight, stride 1, padding 1, without bias.

    x: (N, C, H, W); weights: (C_out, C, 3, 3), all of one shape. Also under autocast.
    Differentiable; where `fuses` says so it keeps x and the weights only.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_convolutions(x, weights)
    result: list[Tensor] = _operation(x, tuple(weights))
    return result


def fuses(backend: str, x: Tensor, out_channels: int) -> bool:
    """Whether the backend has a fused form for maps like x, before autocast."""
    from lgcnet_fast.kernels import conv3 as kernel
    from lgcnet_fast.native import conv3 as native

    if backend == "cuda":
        return native.refusal(computed_dtype(x), x.shape, out_channels) is None
    like = x.new_empty(0, x.shape[1], 1, 1, dtype=computed_dtype(x))
    if supposing():  # The device need not exist: one with matrix units.
        return kernel.fits(like, out_channels)
    return kernel.serves(like, out_channels)


def _reference(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    rectified = F.relu(x)
    return [F.conv2d(rectified, weight, padding=1) for weight in weights]


def _apart(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return convolutions([F.relu(x)] * len(weights), weights, [GEOMETRY] * len(weights))


def _run(backend: str, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    if not fuses(backend, x, len(weights[0])):
        return _apart(x, weights)
    return convolutions_of_a_map(_LAUNCHES[backend], x, weights)


def _refuse(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    return dtype_refusal("x", x)


_BACKENDS = ("triton", "cuda")
_LAUNCHES = {
    backend: Launches(
        *(
            partial(one, backend=backend, relu=True)
            for one in (conv3_results, conv3_input_gradient, conv3_weight_gradients)
        )
    )
    for backend in _BACKENDS
}

_operation = Operation(
    "rectified_convolutions",
    _reference,
    **{backend: Implementation(partial(_run, backend), _refuse) for backend in _BACKENDS},
    tuned_as="separable_branches",
)
