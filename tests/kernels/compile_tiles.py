"""Compiles 3x3 convolutions of wide maps with the tiles that they have by default, without a GPU.

    python -m tests.kernels.compile_tiles 90 float32

Prints a JSON line a launch: bytes of shared memory, and the most that its tile says it takes. Needs
an interpreter in which Triton compiles, so not one with TRITON_INTERPRET set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from lgcnet_fast.kernels import conv3, conv3_stride2, conv3_stride2_backward, conv3_walk
from lgcnet_fast.kernels.common import MOST_SHARED
from tests.kernels.compile_launches import a_map
from tests.kernels.stand_in import StandIn

Launch = tuple[Callable[[], object], int]
"""And bytes of shared memory."""


def rows(dtype: torch.dtype) -> Iterator[Launch]:
    """A small map of one convolution, and a large one of two."""
    for shape, out_channels, edges in (((1, 48, 3, 5), 96, 1), ((16, 64, 32, 64), 64, 2)):
        x, y, weights = operands(shape, out_channels, edges, shape[2:], dtype)
        forward = conv3.Conv3Config.default(shape, shape[1], out_channels, dtype, edges)
        yield partial(conv3.conv3_forward, x, weights, True, forward), forward.shared(dtype)
        backward = conv3.Conv3Config.default(shape, out_channels, shape[1], dtype)
        yield (
            partial(conv3.conv3_input_grad, [y] * edges, x, weights, True, backward),
            backward.shared(dtype),
        )


def walks(dtype: torch.dtype) -> Iterator[Launch]:
    """Of gradients of 48 channels, as operations have them, and of the most there may be."""
    for channels in (48, conv3_walk.MOST_CHANNELS):
        x, y, weights = operands((1, 48, 3, 5), channels, 1, (3, 5), dtype)
        tile = conv3_walk.WalkConfig.default(channels, 48, dtype, masked=True)
        launch = partial(conv3_walk.conv3_walk_input_grad, y, x, weights[0], True, tile)
        yield launch, tile.shared(channels, dtype)


def stride_2(dtype: torch.dtype) -> Iterator[Launch]:
    """Few programs and many; two convolutions; weights of the fewest results."""
    for shape, out_channels, edges in (
        ((1, 64, 4, 6), 128, 1),
        ((16, 64, 128, 256), 128, 1),
        ((16, 64, 64, 128), 64, 2),
    ):
        small = conv3_stride2.small_size(shape[2:])
        x, y, weights = operands(shape, out_channels, edges, small, dtype)
        tile = conv3_stride2.Stride2Config.strided(y.shape, out_channels, dtype, edges)
        launch = partial(conv3_stride2.strided_convolutions, x, weights, tile)
        yield launch, tile.shared_of_strided(dtype)
    x, y, _ = operands((1, 64, 4, 6), 16, 1, (2, 3), dtype)
    yield partial(conv3_stride2_backward.strided_weight_grad, [y], [x]), MOST_SHARED


def operands(
    shape: tuple[int, ...], out_channels: int, edges: int, size: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A map, a result, which has this size, and weights."""
    weight = a_map((out_channels, shape[1], 3, 3), dtype)
    return a_map(shape, dtype), a_map((shape[0], out_channels, *size), dtype), [weight] * edges


def main() -> None:
    arch, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    driver.set_active(StandIn(arch))
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    run = triton.JITFunction.run
    compiled: list[tuple[str, int]] = []

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
        found = run(kernel, *arguments, **(options | {"warmup": True}))
        compiled.append((kernel.fn.__name__, found.metadata.shared))
        return found

    triton.JITFunction.run = compile_only
    for family in (rows, walks, stride_2):
        for launch, most in family(dtype):
            launch()
            kernel, shared = compiled.pop()
            print(json.dumps({"kernel": kernel, "shared": shared, "most": most}), flush=True)


if __name__ == "__main__":
    main()
