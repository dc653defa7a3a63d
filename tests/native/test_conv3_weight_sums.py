"""Weight gradients of dense 3x3 convolutions in float32, on every route that this machine has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from lgcnet_fast.native import conv3_weight_sums as module
from lgcnet_fast.native import instances
from lgcnet_fast.native.conv3_weight_sums import ARGUMENTS, TILES, conv3_weight_sums, plan
from lgcnet_fast.native.launcher import Launcher
from tests.native.conftest import Emulated
from tests.native.truth import assert_close, nhwc, poisoned, poisoned_memory

# Convolutions, images; channels of x, of dy; height, width.
CASES = [
    ((1, 1), (32, 32), (1, 1)),
    ((1, 40), (32, 32), (1, 1)),
    ((1, 50), (48, 48), (1, 1)),
    ((1, 20), (64, 64), (1, 2)),
    ((3, 2), (32, 32), (3, 5)),
    ((1, 3), (32, 32), (7, 9)),
    ((1, 1), (32, 32), (49, 13)),
    ((1, 2), (64, 64), (1, 1)),
    ((2, 3), (64, 64), (7, 1)),
    ((1, 2), (64, 64), (49, 13)),
    ((1, 1), (64, 32), (7, 9)),
    ((2, 1), (48, 48), (1, 17)),
    ((1, 2), (48, 48), (3, 40)),
    ((1, 3), (48, 48), (7, 9)),
    ((1, 1), (144, 48), (3, 5)),
    ((1, 2), (128, 64), (3, 5)),
    ((1, 1), (64, 128), (5, 15)),
]
LARGE = [
    ((2, 16), (32, 64), (64, 128)),
    ((1, 4), (144, 48), (97, 53)),
    ((2, 2), (64, 128), (49, 97)),
    ((12, 3), (48, 48), (45, 60)),
    ((1, 16), (128, 256), (16, 32)),
]


def some_maps(
    count: int, shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [nhwc(torch.randn(shape, generator=generator), device) for _ in range(count)]


def operands(
    counts: tuple[int, int],
    channels: tuple[int, int],
    size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """dys, xs."""
    convolutions, images = counts
    xs = some_maps(convolutions, (images, channels[0], *size), 1, device)
    return some_maps(convolutions, (images, channels[1], *size), 2, device), xs


def exact(dy: Tensor, x: Tensor, relu: bool) -> Tensor:
    """(C_out, 3, 3, C), float64."""
    shape = (dy.shape[1], x.shape[1], 3, 3)
    rectified = x.double().relu() if relu else x.double()
    return conv2d_weight(rectified, shape, dy.double(), padding=1).permute(0, 2, 3, 1)


def check(dys: list[Tensor], xs: list[Tensor], relu: bool, launcher: Launcher) -> Tensor:
    with poisoned_memory():
        sums = conv3_weight_sums(dys, xs, relu=relu, launcher=launcher)
    assert sums.shape == (len(xs), dys[0].shape[1], 3, 3, xs[0].shape[1])
    for at, (dy, x) in enumerate(zip(dys, xs, strict=True)):
        found = sums[at]
        assert_close(found, exact(dy, x, relu), torch.float32, terms=dy[:, 0].numel())
    return sums


def test_the_arguments_are_as_large_as_the_kernels(emulated: Emulated) -> None:
    for tile in TILES:
        instance = instances.conv3_weight_sums(tile)
        assert emulated.argument_bytes(instance) == ARGUMENTS.itemsize


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("counts", "channels", "size"), CASES)
def test_weight_gradients(
    launcher: Launcher,
    device: torch.device,
    counts: tuple[int, int],
    channels: tuple[int, int],
    size: tuple[int, int],
    relu: bool,
) -> None:
    check(*operands(counts, channels, size, device), relu, launcher)


@pytest.mark.parametrize("channels", [32, 48, 64])
def test_many_parts(
    launcher: Launcher, device: torch.device, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chunk each, and nothing is written beside the shares."""
    step = TILES[channels].walks * TILES[channels].chunk
    parts = -(-2 * 7 * 10 // step)
    memory = torch.full((2 + parts * 2, channels, 3, 3, channels), float("nan"), device=device)
    monkeypatch.setattr(
        module, "plan", lambda *sizes: replace(plan(*sizes), part=step, parts=parts)
    )
    monkeypatch.setattr(module, "empty_floats", lambda like, *shape: memory[1:-1].view(shape))
    dys, xs = operands((2, 2), (channels, channels), (7, 9), device)
    check(dys, xs, True, launcher)
    assert parts > 4
    assert memory[[0, -1]].isnan().all() and not memory[1:-1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("counts", "channels", "size"), LARGE)
def test_large_maps(
    gpu_launcher: Launcher,
    counts: tuple[int, int],
    channels: tuple[int, int],
    size: tuple[int, int],
    relu: bool,
) -> None:
    dys, xs = operands(counts, channels, size, "cuda")
    sums = check(dys, xs, relu, gpu_launcher)
    again = conv3_weight_sums(dys, xs, relu=relu, launcher=gpu_launcher)
    assert torch.equal(sums, again)


@pytest.mark.parametrize("channels", [32, 48])
def test_every_run_finds_the_same_bits(
    launcher: Launcher, device: torch.device, channels: int
) -> None:
    dys, xs = operands((1, 1), (channels, channels), (7, 9), device)
    runs = [conv3_weight_sums(dys, xs, launcher=launcher) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("channels", [32, 48, 64])
@pytest.mark.parametrize("relu", [False, True])
def test_nothing_beside_the_maps_is_read(
    launcher: Launcher, device: torch.device, channels: int, relu: bool
) -> None:
    """Before and behind them is NaN."""
    made = []
    for (one,) in operands((1, 2), (channels, channels), (3, 5)):
        size, margin = one.numel(), 8 * channels
        memory = torch.full((size + 2 * margin,), float("nan"), device=device)
        place = memory[margin:-margin].view(2, 3, 5, channels).movedim(-1, 1)
        made.append([place.copy_(one)])
    check(*made, relu, launcher)


@pytest.mark.parametrize("channels", [32, 48, 64])
def test_no_number_passes_a_relu(launcher: Launcher, device: torch.device, channels: int) -> None:
    """And reaches nothing but its channel; negative infinity does not pass."""
    dys, xs = operands((1, 1), (channels, channels), (5, 7), device)
    xs[0][0, 3, 2, 4], xs[0][0, 5, 2, 4] = float("nan"), float("-inf")
    (sums,) = conv3_weight_sums(dys, xs, relu=True, launcher=launcher)
    assert sums[..., 3].isnan().all()
    rest = [c for c in range(channels) if c != 3]
    wanted = exact(dys[0], xs[0], True)[..., rest]
    assert_close(sums[..., rest], wanted, torch.float32, terms=35)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (49, 13), (64, 128), (10, 193)])
@pytest.mark.parametrize("channels", [(32, 32), (64, 64), (144, 48), (96, 48), (128, 256)])
@pytest.mark.parametrize(("convolutions", "images"), [(1, 2), (2, 16), (7, 3)])
@pytest.mark.parametrize("processors", [30, 132])
def test_parts_are_whole_and_fill_the_gpu(
    size: tuple[int, int],
    channels: tuple[int, int],
    convolutions: int,
    images: int,
    processors: int,
) -> None:
    found = plan(convolutions, (images, channels[0], *size), channels[1], processors)
    positions = images * size[0] * (size[1] + 1)
    assert found.part % (found.tile.walks * found.tile.chunk) == 0
    assert (found.parts - 1) * found.part < positions <= found.parts * found.part
    assert found.parts == 1 or found.part >= module.FEWEST_POSITIONS
    room = processors * found.tile.blocks
    assert found.parts * found.blocks <= max(room, found.blocks)


def test_tiles() -> None:
    wanted = {(32, 64): 32, (64, 128): 64, (128, 256): 64, (96, 48): 48, (144, 48): 48}
    for (channels, outputs), tile in {**wanted, (96, 96): 32, (192, 64): 64}.items():
        assert plan(1, (1, channels, 4, 4), outputs, 132).channels == tile


X, DY = nhwc(torch.zeros(1, 32, 4, 5)), nhwc(torch.zeros(1, 64, 4, 5))
MOVED = torch.zeros(641)[1:].view(1, 4, 5, 32).movedim(-1, 1)
BAD = {
    "dys: 1 maps, xs: 2": ([DY], [X, X]),
    "dys: 0 maps, xs: 0": ([], []),
    r"dys\[0\]: shape": ([nhwc(torch.zeros(1, 64, 4, 6))], [X]),
    r"dys\[1\]: shape": ([DY, X], [X, X]),
    r"dys\[0\]: dtype": ([DY.half()], [X]),
    r"xs\[1\]: dtype": ([DY, DY], [X, X.half()]),
    r"xs\[0\]: strides .* not dense": (
        [DY],
        [poisoned((1, 32, 4, 5), torch.float32, torch.device("cpu"))],
    ),
    "xs: no kernel for this, torch.bfloat16": ([DY.bfloat16()], [X.bfloat16()]),
    "xs: no kernel for this, 13 convolutions, at most 12": ([DY] * 13, [X] * 13),
    "xs: no kernel for this, 32 and 48 channels": ([nhwc(torch.zeros(1, 48, 4, 5))], [X]),
    "xs: no kernel for this, a map whose address": ([DY], [MOVED]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(emulated: Launcher, message: str) -> None:
    dys, xs = BAD[message]
    with pytest.raises(ValueError, match=message):
        conv3_weight_sums(dys, xs, launcher=emulated)


def test_maps_of_too_many_positions_are_refused() -> None:
    x = torch.empty(2, 32, 2**15, 2**15, device="meta").to(memory_format=torch.channels_last)
    assert "positions, at most 1073741824 fit" in str(module.refusal(x.dtype, x.shape, 32))
