"""Weight gradients of dense 3x3 convolutions on GPUs of sm_90; their plan anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native import instances
from lgcnet_fast.native.conv3_weight_gradient import (
    ARGUMENTS,
    CHANNELS,
    MOST_PAIRS,
    conv3_weight_gradient,
    plan,
    refusal,
)
from lgcnet_fast.native.hopper import MOST_SHARED
from lgcnet_fast.native.launcher import Launcher
from tests.native.conftest import Emulated
from tests.native.truth import assert_close, nhwc, poisoned_memory

SIZES = ((1, 1), (3, 5), (9, 13), (23, 30), (16, 32), (32, 64), (45, 60), (49, 97), (64, 128))
SIZES += ((10, 193),)


def test_the_arguments_are_as_large_as_the_kernels(emulated: Emulated) -> None:
    instance = instances.conv3_weight_gradient("BFloat16", 64)
    assert emulated.argument_bytes(instance) == ARGUMENTS.itemsize


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(16, 16), (32, 64), (64, 64), (144, 48), (128, 256)])
@pytest.mark.parametrize(("convolutions", "images"), [(1, 2), (2, 16), (7, 3)])
def test_walks_reach_every_position(
    size: tuple[int, int], channels: tuple[int, int], convolutions: int, images: int
) -> None:
    height, width = size
    found = plan(convolutions, (images, channels[0], *size), channels[1], 132)
    assert found.shared <= MOST_SHARED
    assert found.columns % 16 == 0 and found.rows % 2 == 0
    walks = images * -(-width // found.columns) * -(-height // found.rows)
    assert 1 <= found.programs <= walks
    assert found.step % 16 == 0 and found.step <= CHANNELS
    blocks_c, blocks_o = -(-channels[0] // found.step), -(-channels[1] // found.out_block)
    assert found.blocks == blocks_c * blocks_o
    assert found.programs * convolutions * found.blocks <= max(132, convolutions * found.blocks)
    # Two pairs are worked on; with a third one is on its way.
    pairs = -(-walks // found.programs) * (found.rows // 2 + 1)
    assert min(3, pairs) <= found.ring <= MOST_PAIRS


def test_blocks_have_positions_enough_to_begin_for() -> None:
    for convolutions, shape, blocks in (
        (2, (16, 64, 32, 64), 64),
        (1, (16, 64, 32, 64), 32),
        (2, (16, 128, 16, 32), 64),
        (1, (16, 144, 64, 128), 126),
    ):
        found = plan(convolutions, shape, shape[1], 132)
        assert found.programs * convolutions * found.blocks == blocks


def test_a_route_without_the_kernel_launches_nothing(emulated: Emulated) -> None:
    x = nhwc(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))
    with pytest.raises(DeviceError, match="emulation: holds no code for sm_90"):
        conv3_weight_gradient([x], [x], launcher=emulated)


def test_maps_that_do_not_fit_each_other(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Emulated, "hopper", True)
    x, wide = (nhwc(torch.zeros(1, 16, 4, w, dtype=torch.bfloat16)) for w in (4, 5))
    with pytest.raises(ValueError, match="dys: 1 maps, xs: 2"):
        conv3_weight_gradient([x], [x, x], launcher=emulated)
    with pytest.raises(ValueError, match="dys: 0 maps"):
        conv3_weight_gradient([], [], launcher=emulated)
    with pytest.raises(ValueError, match=r"dys\[0\]: shape"):
        conv3_weight_gradient([wide], [x], launcher=emulated)
    with pytest.raises(ValueError, match=r"dys\[1\]: shape"):
        conv3_weight_gradient([x, wide], [x, x], launcher=emulated)


def test_a_cpu_is_refused() -> None:
    x = nhwc(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))
    assert refusal([x], [x]) == "it is for GPUs of sm_90"


# -- on a GPU -------------------------------------------------------------------------------------


SLACK = 2
"""Matrix units of sm_90 cut what a sum cannot hold, where others round."""


def random_maps(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [nhwc(torch.randn(shape), "cuda").to(dtype) for _ in range(count)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(16, 16), (32, 64), (64, 64), (144, 48), (80, 112)])
def test_weight_gradients(
    hopper: Launcher, size: tuple[int, int], channels: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for images, convolutions, relu in ((2, 1, False), (3, 3, True)):
        xs = random_maps(convolutions, (images, channels[0], *size), dtype)
        dys = random_maps(convolutions, (images, channels[1], *size), dtype)
        with poisoned_memory():
            shares = conv3_weight_gradient(dys, xs, relu=relu, launcher=hopper)
            again = conv3_weight_gradient(dys, xs, relu=relu, launcher=hopper)
        shape = (channels[1], channels[0], 3, 3)
        for at, (dy, x) in enumerate(zip(dys, xs, strict=True)):
            rectified = x.double().relu() if relu else x.double()
            exact = conv2d_weight(rectified, shape, dy.double(), padding=1).permute(0, 2, 3, 1)
            found = shares[:, at].double().sum(0).float()
            assert_close(found, exact, torch.float32, terms=dy[:, 0].numel(), slack=SLACK)
        assert torch.equal(shares, again)


@pytest.mark.gpu
def test_walks_go_on_through_the_ring(hopper: Launcher) -> None:
    """Many more pairs of rows than shared memory holds."""
    torch.manual_seed(0)
    (x,) = random_maps(1, (40, 144, 40, 100), torch.bfloat16)
    (dy,) = random_maps(1, (40, 144, 40, 100), torch.bfloat16)
    shares = conv3_weight_gradient([dy], [x], launcher=hopper)
    exact = conv2d_weight(x.double(), (144, 144, 3, 3), dy.double(), padding=1)
    found = shares[:, 0].double().sum(0).float()
    exact = exact.permute(0, 2, 3, 1)
    assert_close(found, exact, torch.float32, terms=dy[:, 0].numel(), slack=SLACK)


@pytest.mark.gpu
def test_no_number_passes_a_relu(hopper: Launcher) -> None:
    x, dy = random_maps(2, (1, 16, 9, 13), torch.bfloat16)
    x[0, 3, 4, 5] = float("nan")
    shares = conv3_weight_gradient([dy], [x], relu=True, launcher=hopper)
    missing = shares.sum((0, 1)).isnan().any(0).any(0).any(0)
    assert missing.nonzero().flatten().tolist() == [3]


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_is_named(hopper: Launcher) -> None:
    x, dy = random_maps(2, (1, 24, 9, 13), torch.bfloat16)
    with pytest.raises(ValueError, match="24 channels, not a multiple of 16"):
        conv3_weight_gradient([dy], [x], launcher=hopper)
    x, dy = random_maps(2, (1, 16, 9, 13), torch.bfloat16)
    with pytest.raises(ValueError, match="13 convolutions, at most 12"):
        conv3_weight_gradient([dy] * 13, [x] * 13, launcher=hopper)
    with pytest.raises(ValueError, match=r"dys\[0\]: dtype"):
        conv3_weight_gradient([dy.half()], [x], launcher=hopper)
