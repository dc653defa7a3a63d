"""Convolutions that do not depend on each other, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops.backend import Implementation, Operation
from lgcnet_fast.ops.cast_together import gradient_owners
from lgcnet_fast.ops.conv3_kernels import (
    conv3_input_gradient,
    conv3_results,
    conv3_weight_gradients,
    suits,
    suits_all,
)
from lgcnet_fast.ops.conv3_stride2_kernels import (
    strided_convolutions_forward,
    strided_weight_gradients,
    transposed_convolutions,
)
from lgcnet_fast.ops.conv3_stride2_kernels import suits as suits_stride2
from lgcnet_fast.ops.image_convolution import image_convolution
from lgcnet_fast.ops.image_convolution import suits as suits_image
from lgcnet_fast.ops.lanes import settle, side_by_side
from lgcnet_fast.ops.maps import computed_dtype, dtype_refusal, laid_like, nhwc
from lgcnet_fast.ops.operands import check_beside, check_map
from lgcnet_fast.ops.pointwise_kernels import (
    convolution_gradient,
    map_gradient_by_library,
    pointwise_convolution_backward,
    product_by_library,
    weight_gradient_by_library,
)


class Geometry(NamedTuple):
    """Of a convolution, the same for rows and columns."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1


def convolutions(
    xs: Sequence[Tensor], weights: Sequence[Tensor], geometries: Sequence[Geometry]
) -> list[Tensor]:
    """The convolution of every map with its own weight, without bias, also under autocast.

    xs: (N, C, H, W), weights: (C_out, C, k, k), as many as maps; sizes may differ from one to the
    next. Differentiable; keeps maps and weights. Where a CUDA graph is captured, the fused form
    runs them, and in the backward pass both gradients of each, side by side; under Triton one
    kernel takes both of a 1x1 convolution of stride 1, and one the gradients of the weights of all
    16-bit 3x3 convolutions of stride 1 that have equal shapes; 16-bit 3x3 convolutions of few
    channels or of stride 2, and 3x3 ones of images of up to four channels that need no gradient,
    have kernels of their own.

    Raises `OperandError` naming the argument at fault, `BackendError` where the chosen backend
    cannot serve.
    """
    if not 0 < len(xs) == len(weights) == len(geometries):
        raise OperandError(
            f"xs: {len(xs)} maps, {len(weights)} weights and {len(geometries)} geometries"
        )
    for index, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        check_map(f"xs[{index}]", x)
        if weight.ndim != 4 or weight.shape[1] != x.shape[1]:
            raise OperandError(
                f"weights[{index}]: shape {tuple(weight.shape)}, need (c_out, {x.shape[1]}, k, k)"
            )
        check_beside(f"weights[{index}]", weight, f"xs[{index}]", x)
    result: list[Tensor] = _operation(tuple(xs), tuple(weights), tuple(geometries))
    return result


def _reference(
    xs: Sequence[Tensor], weights: Sequence[Tensor], geometries: Sequence[Geometry]
) -> list[Tensor]:
    every = zip(xs, weights, geometries, strict=True)
    return [F.conv2d(x, weight, None, *geometry) for x, weight, geometry in every]


def _run(
    backend: str,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    geometries: Sequence[Geometry],
) -> list[Tensor]:
    every = list(zip(xs, weights, geometries, strict=True))
    of_images = [backend == "triton" and suits_image(*one) for one in every]
    others = [one for one, of_image in zip(every, of_images, strict=True) if not of_image]
    found = iter(_of_maps(backend, others))
    return [
        image_convolution(x, weight, geometry.stride) if of_image else next(found)
        for (x, weight, geometry), of_image in zip(every, of_images, strict=True)
    ]


def _of_maps(backend: str, every: Sequence[tuple[Tensor, Tensor, Geometry]]) -> tuple[Tensor, ...]:
    if not every:
        return ()
    xs, weights, geometries = zip(*every, strict=True)
    maps = [nhwc(x.to(computed_dtype(x))) for x in xs]
    cast = [weight.to(x.dtype) for weight, x in zip(weights, maps, strict=True)]
    result: tuple[Tensor, ...] = _Convolutions.apply(backend, geometries, *maps, *cast)
    return result


def _refuse(
    xs: Sequence[Tensor], weights: Sequence[Tensor], geometries: Sequence[Geometry]
) -> str | None:
    return dtype_refusal("xs[0]", xs[0])


class _Convolutions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, geometries: Sequence[Geometry], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.backend, ctx.geometries = backend, geometries
        ctx.owners = gradient_owners(tensors[len(geometries) :])
        every = zip(geometries, _each(tensors, geometries), strict=True)
        jobs = [_result(backend, geometry, *one) for geometry, one in every]
        return tuple(y for (y,) in side_by_side(tensors[0].device, jobs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        maps = [nhwc(g) for g in gradients]
        every = _each(tensors, ctx.geometries)
        wanted = ctx.needs_input_grad[2 : 2 + len(maps)]
        jobs, later = _gradient_jobs(ctx.backend, ctx.geometries, maps, every, wanted)
        parts = side_by_side(
            tensors[0].device,
            [partial(_like, tensors, *one) for one in jobs],
            [partial(_like, tensors, *one) for one in later],
        )
        settle(tensors[0].device, ctx.owners)
        found = {
            place: gradient
            for (places, _), part in zip([*jobs, *later], parts, strict=True)
            for place, gradient in zip(places, part, strict=True)
        }
        return None, None, *(found.get(place) for place in range(len(tensors)))


Convolution = tuple[Tensor, Tensor, tuple[Any, ...]]


def _each(tensors: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Convolution]:
    """(x, weight, what torch's convolution takes after the bias); maps come first in tensors."""
    count = len(geometries)
    return [
        (x, weight, ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1))
        for x, weight, (stride, padding, dilation) in zip(
            tensors[:count], tensors[count:], geometries, strict=True
        )
    ]


def _result(
    backend: str, geometry: Geometry, x: Tensor, weight: Tensor, arguments: tuple[Any, ...]
) -> Callable[[], Sequence[Tensor]]:
    if backend == "triton" and suits_stride2(x, weight, geometry):
        return partial(strided_convolutions_forward, x, [weight])
    if suits_all(backend, x, weight, geometry):
        return partial(conv3_results, x, [weight], backend)
    if _is_product(backend, x, weight, geometry):
        return lambda: [product_by_library(x, weight.flatten(1))]
    return lambda: [torch.ops.aten.convolution(x, weight, None, *arguments)]


Job = tuple[Sequence[int], Callable[[], Iterable[Tensor]]]
"""Places of gradients, those of maps before those of weights, and what computes them."""


def _gradient_jobs(
    backend: str,
    geometries: Sequence[Geometry],
    gradients: Sequence[Tensor],
    every: Sequence[Convolution],
    wanted: Sequence[bool],
) -> tuple[list[Job], list[Job]]:
    """Together they give the gradients of `wanted` maps and of all weights.

    The second ones give those of weights alone.
    """
    count = len(every)
    jobs: list[Job] = []
    later: list[Job] = []
    together = _weights_together(backend, geometries, every)
    for group in together:
        operands = [(gradients[index], *every[index][:2]) for index in group]
        job = partial(conv3_weight_gradients, *map(list, zip(*operands, strict=True)), backend)
        later.append(([count + index for index in group], job))
    served = {index for group in together for index in group}
    for index, (g, geometry, one) in enumerate(zip(gradients, geometries, every, strict=True)):
        x, weight, _ = one
        if backend == "triton" and weight.shape[2:] == (1, 1) and geometry[:2] == (1, 0):
            job = partial(pointwise_convolution_backward, g, x, weight)
            jobs.append(((index, count + index), job))
            continue
        if backend == "triton" and suits_stride2(x, weight, geometry):
            if wanted[index]:
                jobs.append(((index,), partial(_of_strided_map, g, x, weight)))
            job = partial(strided_weight_gradients, [g], [x], [weight])
            later.append(((count + index,), job))
            continue
        if wanted[index]:
            jobs.append(((index,), partial(_of_map, backend, geometry, g, *one)))
        if index not in served:
            later.append(((count + index,), partial(_of_weight, backend, geometry, g, *one)))
    return jobs, later


def _weights_together(
    backend: str, geometries: Sequence[Geometry], every: Sequence[Convolution]
) -> list[list[int]]:
    """Convolutions of equal shapes whose weights' gradients one kernel takes."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, (geometry, (x, weight, _)) in enumerate(zip(geometries, every, strict=True)):
        if suits(backend, x, weight, geometry):
            groups.setdefault((x.shape, weight.shape, x.dtype), []).append(index)
    return list(groups.values())


def _of_map(
    backend: str,
    geometry: Geometry,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    arguments: tuple[Any, ...],
) -> tuple[Tensor]:
    if suits_all(backend, x, weight, geometry):
        return (conv3_input_gradient([g], x, [weight], backend),)
    if _is_product(backend, x, weight, geometry):
        return (map_gradient_by_library(g, weight.flatten(1)),)
    return _alone(0, g, x, weight, arguments)


def _of_weight(
    backend: str,
    geometry: Geometry,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    arguments: tuple[Any, ...],
) -> tuple[Tensor]:
    if _is_product(backend, x, weight, geometry):
        return (weight_gradient_by_library(g, x).view(weight.shape),)
    return _alone(1, g, x, weight, arguments)


def _is_product(backend: str, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a library's product of matrices is faster than its convolution: of 32 bits."""
    pointwise = weight.shape[2:] == (1, 1) and geometry[:2] == (1, 0)
    return backend == "cuda" and x.dtype == torch.float32 and pointwise


def _alone(
    which: int, g: Tensor, x: Tensor, weight: Tensor, arguments: tuple[Any, ...]
) -> tuple[Tensor]:
    return (convolution_gradient(which, g, x, weight, arguments),)


def _of_strided_map(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (transposed_convolutions([g], [weight], x.shape[2:]),)


def _like(
    tensors: Sequence[Tensor], places: Sequence[int], job: Callable[[], Iterable[Tensor]]
) -> list[Tensor]:
    """The gradients of a job; those of weights as `laid_like` gives them."""
    found = list(job())
    of_weights = [at for at, place in enumerate(places) if place >= len(tensors) // 2]
    laid = laid_like([tensors[places[at]] for at in of_weights], [found[at] for at in of_weights])
    for at, g in zip(of_weights, laid, strict=True):
        found[at] = g
    return found


_operation = Operation(
    "convolutions",
    _reference,
    **{backend: Implementation(partial(_run, backend), _refuse) for backend in ("triton", "cuda")},
    tuned_as="separable_branches",
)
