"""1x1 convolutions of the even and of the odd pixels: a factorised reduction but its batch norm.

Under Triton one kernel makes the result and another all gradients. Where these do not serve, the
fused form is a single convolution of stride 2 whose larger kernel holds both weights, one in each
corner, and zeros. The map is neither shifted nor padded, and the halves of the output need not be
put together.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal, empty_nhwc, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map
from lgcnet_fast.ops.pointwise_kernels import convolution_gradient


def interleaved_convolution(x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, A + B, ceil(H / 2), ceil(W / 2)), also under autocast.

    even: (A, C, 1, 1), weight of the first channels, which see the pixels (2i, 2j); odd: (B, C, 1,
    1), of those that see the pixels (2i + 1, 2j + 1), which are 0 beyond an odd size.

    The fused form keeps x for the backward pass, the reference also a shifted copy.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    check_map("x", x)
    for name, weight in (("even", even), ("odd", odd)):
        if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 1, 1):
            raise OperandError(
                f"{name}: shape {tuple(weight.shape)}, need (c_out, {x.shape[1]}, 1, 1)"
            )
        check_beside(name, weight, "x", x)
    result: Tensor = _operation(x, even, odd)
    return result


def _reference(x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    shifted = F.pad(x, (-1, 1, -1, 1))
    return torch.cat((F.conv2d(x, even, stride=2), F.conv2d(shifted, odd, stride=2)), dim=1)


def _run(backend: str, x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    dtype = computed_dtype(x)
    result: Tensor = _Interleaved.apply(backend, nhwc(x.to(dtype)), even.to(dtype), odd.to(dtype))
    return result


class _Interleaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
        ctx.save_for_backward(x, even, odd)
        ctx.backend, ctx.owners = backend, gradient_owners([even, odd])
        return _interleaved(x, even, odd, backend)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        x, even, odd = ctx.saved_tensors
        dx, dw = _gradients(nhwc(gradient), x, even, odd, ctx.backend)
        settle(x.device, ctx.owners)
        d_even, d_odd = dw.split([len(even), len(odd)])
        return None, dx, d_even.view_as(even), d_odd.view_as(odd)


@custom_op("lgcnet_fast::interleaved", mutates_args=())
def _interleaved(x: Tensor, even: Tensor, odd: Tensor, backend: str) -> Tensor:
    """x: NHWC; all of one dtype."""
    if backend == "triton":
        from lgcnet_fast.kernels import interleaved as kernel

        if kernel.serves(x, even, odd):
            return kernel.interleaved(x, even.flatten(1), odd.flatten(1))
    weight, padding = _as_one(x, even, odd)
    return nhwc(F.conv2d(x, weight, stride=2, padding=padding))


@_interleaved.register_fake
def _(x: Tensor, even: Tensor, odd: Tensor, backend: str) -> Tensor:
    height, width = (-(-length // 2) for length in x.shape[2:])
    return empty_nhwc(x, (len(x), len(even) + len(odd), height, width))


@custom_op("lgcnet_fast::interleaved_gradients", mutates_args=())
def _gradients(
    g: Tensor, x: Tensor, even: Tensor, odd: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Of x, and of both weights, (A + B, C), in their dtype; g, x: NHWC.

    That of the weights comes of a job for later, see lanes.py.
    """
    if backend == "triton":
        from lgcnet_fast.kernels import interleaved as kernel

        if kernel.serves(x, even, odd):
            dx, shares = kernel.interleaved_gradients(g, x, even.flatten(1), odd.flatten(1))
            (dw,) = side_by_side(x.device, [], [partial(kernel.summed, shares, even.dtype)])
            return dx, dw
    weight, padding = _as_one(x, even, odd)
    geometry = ([2, 2], [padding] * 2, [1, 1], False, [0, 0], 1)
    dx, dw = side_by_side(
        x.device,
        [partial(convolution_gradient, 0, g, x, weight, geometry)],
        [lambda: _of_corners(convolution_gradient(1, g, x, weight, geometry), len(even))],
    )
    return nhwc(dx), dw


@_gradients.register_fake
def _(g: Tensor, x: Tensor, even: Tensor, odd: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return empty_nhwc(x, x.shape), even.new_empty(len(even) + len(odd), even.shape[1])


def _of_corners(dw: Tensor, even: int) -> Tensor:
    return torch.cat([corner.flatten(1) for corner in _corners(dw, even)])


def _as_one(x: Tensor, even: Tensor, odd: Tensor) -> tuple[Tensor, int]:
    """The weight (A + B, C, k, k) of a single convolution, and its padding.

    Beyond an odd side there must be zeros, which padding adds on both sides: there k = 3, else 2.
    """
    padding = 1 if x.shape[-2] % 2 or x.shape[-1] % 2 else 0
    kernel = 2 + padding
    weight = empty_nhwc(even, (len(even) + len(odd), even.shape[1], kernel, kernel)).zero_()
    for corner, values in zip(_corners(weight, len(even)), (even, odd), strict=True):
        corner.copy_(values)
    return weight, padding


def _corners(weight: Tensor, even: int) -> tuple[Tensor, Tensor]:
    """Where the first `even` outputs see pixel (2i, 2j), and the others (2i + 1, 2j + 1)."""
    kernel = weight.shape[-1]
    first, second = slice(kernel - 2, kernel - 1), slice(kernel - 1, kernel)
    return weight[:even, :, first, first], weight[even:, :, second, second]


def _refuse(x: Tensor, even: Tensor, odd: Tensor) -> str | None:
    if even.dtype != odd.dtype:
        return f"even is {even.dtype}, odd is {odd.dtype}"
    return dtype_refusal("x", x)


_operation = Operation(
    "interleaved_convolution",
    _reference,
    **{backend: Implementation(partial(_run, backend), _refuse) for backend in ("triton", "cuda")},
    tuned_as="separable_branches",
)
