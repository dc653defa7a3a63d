"""Compiles every kernel of training for the arguments of real launches, without a GPU.

    python -m tests.kernels.compile_launches 90 float32

The maps, of that dtype, are as small as they can be: what is 1 becomes a constant of the compiled
kernel. Prints a JSON line a kernel: its loops that `carried_bounds` finds, what it computes in
float32, and how its launches relate to the ones before. Needs an interpreter in which Triton
compiles, so not one with TRITON_INTERPRET set.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from lgcnet_fast.kernels import (
    average_pool,
    concat_pair,
    concat_pointwise,
    concat_pointwise_backward,
    concat_upsample,
    concat_upsample_backward,
    conv3,
    conv3_backward,
    conv3_stride2,
    conv3_stride2_backward,
    conv3_walk,
    covariance,
    depthwise,
    depthwise_backward,
    depthwise_input_grad,
    depthwise_weight_grad,
    gradient_sum,
    image_convolution,
    interleaved,
    max_pool,
    mixed_sum,
    mixed_sum_backward,
    normalised_depthwise,
    pointwise_backward,
    product_algebra,
    product_gradients,
    product_sum,
    rectified_pointwise,
    upsample_argmax,
    upsample_loss,
    weight_stacks,
)
from tests.kernels.carried_bounds import carried_bounds
from tests.kernels.stand_in import StandIn

SHAPES = ((2, 1, 1, 1), (2, 3, 1, 2), (2, 16, 2, 1))
TARGETS = ((1, 1), (2, 1), (3, 5))
Launch = Callable[[Tensor], object]


def a_map(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    images, channels, height, width = shape
    return torch.zeros(images, height, width, channels, dtype=dtype).movedim(-1, 1)


def pool(x: Tensor) -> None:
    for stride in (1, 2):
        max_pool.max_pool_forward(x, stride)
        y, winners = max_pool.max_pool_winners(x, stride)
        max_pool.max_pool_backward(winners, [y, y], (x.shape[2], x.shape[3]), stride)


def means(x: Tensor) -> None:
    for bins in ((1,), (2, 1, 5)):
        windows = average_pool.PoolWindows.of(x.shape[2], x.shape[3], bins, x.device)
        y = average_pool.average_pools_forward(x, windows)
        average_pool.average_pools_backward(y, x.shape, bins)


def depthwise_filters(x: Tensor) -> None:
    for stride in (1, 2):
        for dilations in ((1,), (2,), (1, 4)):
            weights = x.new_zeros(1, len(dilations), 3, 3, x.shape[1])
            arguments = (x, weights, dilations, stride)
            dy = depthwise.depthwise_multi(*arguments)
            for maps in (dy, dy.flatten(0, 1).unbind()):
                depthwise_input_grad.depthwise_multi_input_grad(maps, *arguments, others=[x, x])
                depthwise_weight_grad.depthwise_multi_weight_grad(maps, *arguments)
        weight = x.new_zeros(3, 3, x.shape[1])
        for dilation in (1, 2):
            dy = depthwise.depthwise(x, weight, dilation, stride)
            depthwise_backward.depthwise_backward(dy, x, weight, dilation, stride)
    for edges in (1, 2):
        norm, xs = (x.new_zeros(edges, x.shape[1]), x.new_ones(edges, x.shape[1])), [x] * edges
        arguments = (xs, x.new_zeros(edges, 3, 3, x.shape[1]), norm)
        normalised_depthwise.normalised_depthwise(*arguments)
        e, _, sums = normalised_depthwise.normalised_depthwise_backward(xs, *arguments)
        normalised_depthwise.norm_gradients(e, xs, norm, sums)


def stacked_weights(x: Tensor) -> None:
    channels = x.shape[1]
    weights = [[x.new_zeros(channels, 1, 3, 3)], [x.new_zeros(channels, channels, 1, 1)]]
    weight_stacks.WeightStacks(weights).filled(x.dtype)


def mixture(x: Tensor) -> None:
    weight = x.new_ones(1)
    statistics = mixed_sum.batch_statistics([x])
    mixed_sum.mixed_sum([x], weight, statistics, [x], weight)
    sums = mixed_sum_backward.mixed_sum_gradient_sums(x, [x], statistics, [x])
    mixed_sum_backward.mixed_sum_grad(x, [x], weight, statistics, sums, weight)
    gammas = [x.new_ones(x.shape[1]), x.new_ones(x.shape[1])]
    statistics = mixed_sum.batch_statistics([x, x])
    for plain in ([], [x]):
        mixed_sum.affine_sum([x, x], gammas, gammas, statistics, plain)
    sums = mixed_sum_backward.mixed_sum_gradient_sums(x, [x, x], statistics)
    mixed_sum_backward.affine_sum_grad(x, [x, x], gammas, statistics, sums)
    gradient_sum.gradient_sum([x, x], x, relu=True)
    y = concat_pair.concat_pair_forward(x, x, relu=True)
    concat_pair.concat_pair_backward([y, y], y, relu=True)


def products(x: Tensor) -> None:
    channels = x.shape[1]
    for maps in (1, 2):
        stack = x.new_zeros(maps, *x.movedim(1, -1).shape).movedim(-1, 2)
        weights = torch.zeros(maps, channels, channels)
        pointwise_backward.pointwise_backward([x] * maps, stack, weights, stack)
    for stride in (1, 2):
        conv3_backward.conv3_weight_grad([x] * stride, [x] * stride)
        window = x.new_zeros(channels, 3, 3, channels).movedim(-1, 1)
        conv3.conv3_forward(x, [window] * stride, relu=True)
        conv3.conv3_input_grad([x] * stride, x, [window] * stride, relu=True)
        ys = conv3_stride2.strided_convolutions(x, [window] * stride)
        conv3_stride2.transposed_convolutions(ys, [window] * stride, x.shape[2:])
        if channels % 8 == 0:  # All that it takes on a GPU.
            conv3_stride2_backward.strided_weight_grad(ys, [x] * stride)
    conv3_walk.conv3_walk(x, window, relu=True)
    conv3_walk.conv3_walk_input_grad(x, x, window, relu=True)
    weight = x.new_zeros(channels, channels)
    half, w = x.bfloat16(), weight.bfloat16()
    y = rectified_pointwise.rectified_pointwise(half, w, w[0])
    rectified_pointwise.rectified_pointwise_input_grad(y, half, w)
    rectified_pointwise.rectified_pointwise_weight_grad(y, half)
    y = interleaved.interleaved(x, weight, weight)
    _, shares = interleaved.interleaved_gradients(y, x, weight, weight)
    interleaved.summed(shares, weight.dtype)


def convolutions_of_images(x: Tensor) -> None:
    image, weight = x[:, :3].contiguous(), x.new_zeros(5, min(3, x.shape[1]), 3, 3)
    for stride in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            y = image_convolution.image_convolution(image, weight, stride, dtype)
            image_convolution.image_weight_grad(y, image, stride)


def nodes_of_products(x: Tensor) -> None:
    channels = x.shape[1]
    for maps in (1, 2):
        ds, z, p = [x] * maps, torch.zeros(maps), torch.zeros(maps, channels, channels)
        mean, matrices = covariance.covariance(ds)
        statistics, weights, shifts = product_algebra.product_weights(mean, matrices, p, z, 1e-5)
        for others in ([], [x]):
            of_others = z.new_zeros(2 * len(others))
            of_raw = z.new_zeros(3, len(others), channels)
            product_sum.product_sum(ds, weights, shifts, others, of_raw, others, of_others)
        sums, s0 = product_gradients.product_sums(x, ds)
        for training in (True, False):
            _, _, *coefficients = product_algebra.product_coefficients(
                sums, s0, mean, matrices, p, statistics, z, 2, training
            )
            product_gradients.product_input_gradients(x, ds, *coefficients, ds)


def resizes(x: Tensor) -> None:
    size, channels = (x.shape[2], x.shape[3]), x.shape[1]
    for target in TARGETS:
        out = concat_upsample.concat_upsample_forward([x, x], target)
        concat_upsample_backward.concat_upsample_backward(out, [channels] * 2, [size] * 2)
        total = concat_upsample.sum_upsample_forward([x, x], target)
        concat_upsample_backward.sum_upsample_backward(total, [size] * 2)


def products_of_concatenations(x: Tensor) -> None:
    channels = x.shape[1]
    for others in ((), (channels,), (17, 1)):
        maps = [x, *(a_map((len(x), count, *x.shape[2:]), x.dtype) for count in others)]
        weight = torch.zeros(channels, channels + sum(others))
        for target in TARGETS:
            y = concat_pointwise.concat_pointwise(maps, weight, target)
            concat_pointwise_backward.concat_pointwise_backward(y, maps, weight, target)


def losses(x: Tensor) -> None:
    for size in ((1, 1), (3, 5)):
        upsample_argmax.upsample_argmax_forward(x, size)
        target = torch.zeros(x.shape[0], *size, dtype=torch.uint8)
        loss, sums = upsample_loss.upsample_cross_entropy_forward(x, target, ignore_index=1)
        upsample_loss.upsample_loss_backward(sums, loss, x)


def hard_examples(x: Tensor) -> None:
    for size in ((1, 1), (3, 5)):
        target = torch.zeros(x.shape[0], *size, dtype=torch.uint8)
        upsample_loss.upsample_ohem_forward(x, target)


FAMILIES: tuple[Launch, ...] = (
    pool, means, depthwise_filters, stacked_weights, mixture, resizes, losses,
)  # fmt: skip
FLOAT32_FAMILIES: tuple[Launch, ...] = (
    products, convolutions_of_images, products_of_concatenations, nodes_of_products, hard_examples,
)  # fmt: skip
"""Products are not compiled for float64, and losses are ranked in float32."""
WAIT = "griddepcontrol.wait"
IN_MEMORY = rf"{WAIT}|\b(?:ld|st|atom|red)\.global|\bcp\.async"


def float32_operations(ttir: str) -> list[str]:
    """Lines of a kernel's body in which float32 occurs."""
    lines = [line.split(" loc(")[0].strip() for line in ttir.splitlines()]
    return [line for line in lines if "f32" in line and not line.startswith("tt.func")]


def order(compiled: Any) -> str:
    """`after`: it starts when the launch before is complete; `waits`: it waits for that itself,
    ahead of all else in memory; `races`: neither.
    """
    if not compiled.metadata.launch_pdl:
        return "after"
    first = re.search(IN_MEMORY, compiled.asm["ptx"])
    return "waits" if first and first[0] == WAIT else "races"


def main() -> None:
    arch, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    driver.set_active(StandIn(arch))
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    launch = triton.JITFunction.run
    found: dict[str, dict[str, set[str]]] = {}

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
        compiled = launch(kernel, *arguments, **(options | {"warmup": True}))
        ttir = compiled.asm["ttir"]
        none = {"carried_bounds": set(), "float32": set(), "order": set()}
        lines = found.setdefault(kernel.fn.__name__, none)
        lines["carried_bounds"].update(carried_bounds(ttir))
        lines["float32"].update(float32_operations(ttir))
        lines["order"].add(order(compiled))
        return compiled

    triton.JITFunction.run = compile_only
    for shape in SHAPES:
        for family in FAMILIES + (FLOAT32_FAMILIES if dtype == torch.float32 else ()):
            family(a_map(shape, dtype))
    for name, lines in found.items():
        print(json.dumps({"kernel": name} | {key: sorted(value) for key, value in lines.items()}))


if __name__ == "__main__":
    main()
