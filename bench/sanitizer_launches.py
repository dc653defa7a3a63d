"""Launches every CUDA kernel there is on small, odd shapes: what compute-sanitizer watches.

    python -m bench.sanitizer_launches --out FILE [--plant out_of_bounds|uninitialised]

Inputs are made on the CPU and copied, and results are copied back, so that the sanitizer knows who
wrote what and sees every element read. Nothing is compared: tests/native does that. A planted
fault shows that the sanitizer looks at our kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.results_file import write_json
from lgcnet_fast.native import depthwise, max_pool, separable
from lgcnet_fast.native.concat_product import concat_product_backward, concat_product_forward
from lgcnet_fast.native.conv3 import conv3, conv3_map_gradient
from lgcnet_fast.native.conv3_weight_gradient import conv3_weight_gradient
from lgcnet_fast.native.conv3_weight_sums import conv3_weight_sums
from lgcnet_fast.native.depthwise_branches import depthwise_branches_backward
from lgcnet_fast.native.gradient_sum import gradient_sum
from lgcnet_fast.native.instances import Instance, all_instances
from lgcnet_fast.native.launcher import Extent, Launcher
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.mixed_sum import batch_statistics, mixed_sum
from lgcnet_fast.native.mixed_sum_backward import mixed_sum_grad, mixed_sum_gradient_sums
from lgcnet_fast.native.operands import STORAGE
from lgcnet_fast.native.upsample import upsample_backward, upsample_forward
from lgcnet_fast.native.upsample_argmax import upsample_argmax_forward
from lgcnet_fast.native.upsample_loss import (
    upsample_cross_entropy_forward,
    upsample_loss_backward,
    upsample_ohem_forward,
)

IMAGES, HEIGHT, WIDTH = 2, 9, 13
CHANNELS = (16, 17)
"""For the widest vectors and for single channels."""
THREADS = 64


class Recording(Launcher):
    """Passes launches on and remembers what was launched."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.route, self.device_type = launcher.route, launcher.device_type
        self.hopper = launcher.hopper
        self.launched: set[Instance] = set()

    def launch(
        self,
        instance: Instance,
        grid: Extent,
        block: Extent,
        arguments: np.ndarray,
        device: torch.device,
        shared: int = 0,
    ) -> None:
        self._launcher.launch(instance, grid, block, arguments, device, shared)
        self.launched.add(instance)

    def processors(self, device: torch.device) -> int:
        return self._launcher.processors(device)


class Inputs:
    """Random tensors of one storage type, copied to where the launcher wants them."""

    def __init__(self, dtype: torch.dtype, launcher: Launcher) -> None:
        self.dtype, self.storage, self.launcher = dtype, STORAGE[dtype], launcher
        self._generator = torch.Generator().manual_seed(0)

    def map(self, channels: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
        """Dense NHWC, so that one element too far is out of bounds."""
        shape = (IMAGES, height, width, channels)
        values = torch.randn(shape, generator=self._generator).to(self.dtype)
        return values.to(self.launcher.device_type).movedim(-1, 1)

    def floats(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator).to(self.launcher.device_type)

    def labels(self, classes: int, height: int, width: int) -> Tensor:
        shape = (IMAGES, height, width)
        labels = torch.randint(classes, shape, generator=self._generator)
        labels[:, :2, :3] = 255
        return labels.to(self.launcher.device_type)

    def numbers(self, kernel: str) -> Iterator[list[int]]:
        """Template parameters of a kernel's instantiations for this storage type."""
        for one in all_instances():
            if one.kernel == kernel and one.parameters[0].endswith(self.storage):
                yield [int(parameter) for parameter in one.parameters[1:]]


Results = Iterator[Tensor | None]


def depthwise_kernels(inputs: Inputs) -> Results:
    options = {"relu": True, "launcher": inputs.launcher}
    for vector, stride, columns, rows in inputs.numbers("depthwise_forward"):
        x, weight = inputs.map(_channels(vector)), inputs.floats(3, 3, _channels(vector))
        tile = depthwise.Tile(vector, columns, rows, THREADS)
        for dilation in (1, 5):
            yield depthwise.depthwise_forward(
                x, weight, dilation=dilation, stride=stride, tile=tile, **options
            )
    backward = [(1, *numbers) for numbers in inputs.numbers("depthwise_backward")]
    backward += [(2, v, 1, 1) for (v,) in inputs.numbers("depthwise_backward_stride2")]
    for stride, vector, columns, rows in backward:
        x, weight = inputs.map(_channels(vector)), inputs.floats(3, 3, _channels(vector))
        dy = inputs.map(_channels(vector), -(-HEIGHT // stride), -(-WIDTH // stride))
        tile = depthwise.Tile(vector, columns, rows, THREADS)
        for dilation in (1, 5):
            yield from depthwise.depthwise_backward(
                x, weight, dy, dilation=dilation, stride=stride, tile=tile, **options
            )


def branches_of_a_map(inputs: Inputs) -> Results:
    """Several in a launch of the kernels above, by their default tiles."""
    dilations, channels = [1, 2, 5, 4], _channels(4)
    x, weights = inputs.map(channels), [inputs.floats(3, 3, channels) for _ in dilations]
    for stride in (1, 2):
        options = {"stride": stride, "relu": True, "launcher": inputs.launcher}
        size = -(-HEIGHT // stride), -(-WIDTH // stride)
        maps = [inputs.map(channels, *size).movedim(1, -1) for _ in dilations]
        ys = torch.stack(maps).movedim(-1, 2)
        yield from depthwise.branches_backward(x, weights, dilations, ys, **options)
        depthwise.branches_forward(x, weights, dilations, ys, **options)
        yield ys


def gradient_sums(inputs: Inputs) -> Results:
    for (vector,) in inputs.numbers("gradient_sum"):
        x, *gradients = (inputs.map(_channels(vector)) for _ in range(4))
        for relu in (False, True):
            yield gradient_sum(gradients, x, relu, launcher=inputs.launcher)


def max_pool_kernels(inputs: Inputs) -> Results:
    launcher = inputs.launcher
    for vector, stride in inputs.numbers("max_pool_forward"):
        tile = max_pool.Tile(vector, 4, THREADS)
        x = inputs.map(_channels(vector))
        yield max_pool.max_pool_forward(x, stride, tile=tile, launcher=launcher)
    for stride, kernel in ((1, "max_pool_backward"), (2, "max_pool_backward_stride2")):
        for (vector,) in inputs.numbers(kernel):
            tile = max_pool.Tile(vector, 4, THREADS)
            x = inputs.map(_channels(vector))
            dy = inputs.map(_channels(vector), -(-HEIGHT // stride), -(-WIDTH // stride))
            yield max_pool.max_pool_backward(x, dy, stride, tile=tile, launcher=launcher)


def resizing_kernels(inputs: Inputs) -> Results:
    for channels in CHANNELS:
        for height, width in ((5, 7), (1, 1)):  # one axis at a time from a single pixel
            x, dy = inputs.map(channels, height, width), inputs.map(channels, 37, 41)
            yield upsample_forward(x, (37, 41), launcher=inputs.launcher)
            yield upsample_backward(dy, (height, width), launcher=inputs.launcher)
        dy = inputs.map(channels, 9, 13)
        yield upsample_backward(dy, (5, 7), launcher=inputs.launcher)


def mixed_node_kernels(inputs: Inputs) -> Results:
    launcher = inputs.launcher
    for channels in CHANNELS:
        ys, xs = ([inputs.map(channels) for _ in range(count)] for count in (3, 2))
        z, plain_z, g = inputs.floats(3), inputs.floats(2), inputs.map(channels)
        statistics = batch_statistics(ys, launcher=launcher)
        yield mixed_sum(ys, z, statistics, xs, plain_z, launcher=launcher)
        sums = mixed_sum_gradient_sums(g, ys, statistics, xs, launcher=launcher)
        dys, dxs = mixed_sum_grad(g, ys, z, statistics, sums, plain_z, launcher=launcher)
        yield from (*dys, *dxs)


def loss_kernels(inputs: Inputs) -> Results:
    classes, launcher = 19, inputs.launcher
    logits, target = inputs.map(classes, 5, 7), inputs.labels(classes, 33, 49)
    yield upsample_argmax_forward(logits, (33, 49), launcher=launcher)
    for function in (upsample_cross_entropy_forward, upsample_ohem_forward):
        for weight in (None, inputs.floats(classes)):
            loss, sums = function(logits, target, weight=weight, launcher=launcher)
            assert sums is not None
            yield loss
            yield upsample_loss_backward(sums, inputs.floats(), logits, launcher=launcher)


def separable_kernels(inputs: Inputs) -> Results:
    launcher = inputs.launcher
    for vector, stride, taps, width in inputs.numbers("separable"):
        channels = _channels(vector)
        x, pointwise = inputs.map(channels), inputs.floats(channels, 40)
        options = {"relu": True, "width": width, "launcher": launcher}
        if taps == 1:
            yield separable.pointwise_forward(x, pointwise, inputs.floats(40), **options)
            continue
        window = inputs.floats(3, 3, channels)
        for dilation in (1, 5):
            y = separable.separable_forward(
                x, window, pointwise, None, dilation=dilation, stride=stride, **options
            )
            yield separable.separable_forward(
                x,
                window,
                pointwise,
                dilation=dilation,
                stride=stride,
                out=y,
                accumulate=True,
                **options,
            )


def depthwise_branches_kernels(inputs: Inputs) -> Results:
    if not inputs.launcher.hopper or inputs.dtype == torch.float32:
        return
    dilations = (1, 2, 8)
    for height, width in ((9, 13), (16, 30), (20, 40)):  # each of another instantiation
        x, *dys = [inputs.map(32, height, width) for _ in range(7)]
        weights = inputs.floats(2, 3, 3, 3, 32)
        yield from depthwise_branches_backward(dys, x, weights, dilations, launcher=inputs.launcher)


def conv3_kernels(inputs: Inputs) -> Results:
    if not inputs.launcher.hopper or inputs.dtype == torch.float32:
        return
    for channels, out_channels in ((80, 64), (16, 48), (48, 32)):  # each of another instantiation
        xs = [inputs.map(channels, 9, 20) for _ in range(2)]
        dys = [inputs.map(out_channels, 9, 20) for _ in range(2)]
        yield conv3_weight_gradient(dys, xs, relu=True, launcher=inputs.launcher)


def float_conv3_kernels(inputs: Inputs) -> Results:
    if inputs.dtype != torch.float32:
        return
    launcher = inputs.launcher
    for channels in (64, 32, 48):  # each of another instantiation
        x, weight = inputs.map(channels, 9, 20), inputs.floats(2, 3, 3, channels, channels)
        dys = [inputs.map(channels, 9, 20) for _ in range(2)]
        yield from conv3(x, weight, relu=True, launcher=launcher)
        yield conv3_map_gradient(dys, weight, mask=x, launcher=launcher)
        yield conv3_weight_sums(dys, [x, x], relu=True, launcher=launcher)


def concat_product_kernels(inputs: Inputs) -> Results:
    if inputs.dtype != torch.float32:
        return
    launcher = inputs.launcher
    for channels in (48, 64, 17):  # each of another tile
        maps, weight = (
            [inputs.map(channels), inputs.map(channels)],
            inputs.floats(channels, 2 * channels),
        )
        yield concat_product_forward(maps, weight, relu=True, launcher=launcher)
        dy = inputs.map(channels)
        dxs, dw = concat_product_backward(dy, maps, weight, relu=True, launcher=launcher)
        yield from (*dxs, dw)


FAMILIES: tuple[Callable[[Inputs], Results], ...] = (
    depthwise_kernels,
    branches_of_a_map,
    gradient_sums,
    max_pool_kernels,
    resizing_kernels,
    mixed_node_kernels,
    loss_kernels,
    separable_kernels,
    depthwise_branches_kernels,
    conv3_kernels,
    float_conv3_kernels,
    concat_product_kernels,
)


def launch_all(launcher: Recording) -> None:
    """Exits naming the kernels that were not launched, if there are any."""
    for dtype in STORAGE:
        for family in FAMILIES:
            _read(family(Inputs(dtype, launcher)))
    here = [one for one in all_instances() if launcher.hopper or not one.hopper]
    missing = [one.expression for one in here if one not in launcher.launched]
    if missing:
        raise SystemExit(f"not launched: {', '.join(missing)}")


def plant(fault: str, launcher: Launcher) -> None:
    """A read past the end of a map, or of a map that nobody has written."""
    inputs = Inputs(torch.float32, launcher)
    x, weight = inputs.map(64, 64, 64), inputs.floats(3, 3, 64)
    if fault == "uninitialised":
        x = torch.empty_like(x)
    else:
        storage = x.untyped_storage()
        storage.resize_(storage.nbytes() // 2)
    _read([depthwise.depthwise_forward(x, weight, launcher=launcher)])


def _channels(vector: int) -> int:
    return CHANNELS[vector == 1]


def _read(results: Iterable[Tensor | None]) -> None:
    for result in results:
        if result is not None:
            result.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plant", choices=("out_of_bounds", "uninitialised"))
    options = parser.parse_args()
    launcher = Recording(load())
    if options.plant:
        plant(options.plant, launcher)
    else:
        launch_all(launcher)
    write_json(options.out, summary(launcher))


def summary(launcher: Recording) -> dict[str, Any]:
    families = sorted({one.kernel for one in launcher.launched})
    return {"route": launcher.route, "kernels": families, "instances": len(launcher.launched)}


if __name__ == "__main__":
    main()
