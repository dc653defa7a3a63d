"""The shapes that LGCNet's maps have at the inputs that are measured."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lgcnet_fast.space.base import LutKey
from lgcnet_fast.space.registry import make_space

Size = tuple[int, int]
Shape = tuple[int, int, int, int]

INPUTS: dict[Size, int] = {(256, 512): 16, (769, 769): 16, (360, 480): 16, (769, 1537): 1}
"""Input size -> batch."""
CELLS = ((32, 4), (64, 8), (128, 16))
"""Node channels and stride of the cells, stage by stage."""
FUSION_CHANNELS = 48
CLASSES = 19


def at_stride(size: Size, stride: int) -> Size:
    return -(-size[0] // stride), -(-size[1] // stride)


def cell_shapes(size: Size) -> list[Shape]:
    """Maps inside the cells, finest first."""
    return [(INPUTS[size], channels, *at_stride(size, stride)) for channels, stride in CELLS]


def pyramid(size: Size) -> tuple[Size, Size, Size]:
    """Sizes of the fusion cell's three levels, finest first."""
    fine, middle, coarse = (at_stride(size, stride) for _, stride in CELLS)
    return fine, middle, coarse


def fusion_shapes(size: Size) -> list[Shape]:
    """Maps and concatenations of them that convolutions of the fusion cell read, finest first."""
    fine, middle, coarse = pyramid(size)
    concatenated = [(fine, 1), (fine, 3), (middle, 1), (middle, 2), (coarse, 1)]
    return [(INPUTS[size], maps * FUSION_CHANNELS, *at) for at, maps in concatenated]


def depthwise_uses(size: Size) -> Iterator[tuple[Shape, int, int]]:
    """(shape, dilation, stride) of each depthwise convolution of the network, once."""
    keys = make_space({"name": "lgcnet"}).lut_keys(size, CLASSES)
    uses = {_depthwise(key, INPUTS[size]) for key in keys} - {None}
    yield from sorted(use for use in uses if use is not None)


def _depthwise(key: LutKey, batch: int) -> tuple[Shape, int, int] | None:
    operation = key.op.rpartition(".")[2]
    if operation == "sep3":
        dilation = 1
    elif operation.startswith("dil3_"):
        dilation = int(operation.removeprefix("dil3_"))
    else:
        return None
    return (batch, key.c_in, key.h_in, key.w_in), dilation, key.stride


def random_shapes(count: int = 10) -> Iterator[Shape]:
    """The same ones in every run."""
    draw = random.Random(0)
    for _ in range(count):
        batch, channels = draw.randint(1, 16), draw.randint(8, 200)
        yield batch, channels, draw.randint(9, 200), draw.randint(9, 200)
