"""The depthwise kernels against float64, on every route that this machine has."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.native import depthwise, instances
from lgcnet_fast.native.depthwise import (
    Tile,
    branches_backward,
    branches_forward,
    depthwise_backward,
    depthwise_forward,
)
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.operands import STORAGE
from tests.native.truth import ROUNDING, assert_canaries_live, assert_close, poisoned

SHAPES = [(2, 8, 9, 13), (1, 3, 5, 3), (1, 17, 1, 1), (2, 16, 12, 11), (1, 1, 4, 1)]
LARGE = [(4, 48, 49, 97), (1, 255, 33, 7), (2, 64, 97, 193), (16, 32, 64, 128)]
DILATIONS = (1, 2, 4, 8, 12)


@dataclass(frozen=True)
class Truth:
    """Inputs as the kernels get them, results in float64."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    y: Tensor
    dx: Tensor
    dw: Tensor


def truth(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    dilation: int = 1,
    stride: int = 1,
    relu: bool = False,
) -> Truth:
    generator = torch.Generator().manual_seed(sum(shape) + dilation)
    images, channels, height, width = shape

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    x = random(*shape)
    weight = random(3, 3, channels).float()
    dy = random(images, channels, -(-height // stride), -(-width // stride))
    exact_x = x.double().requires_grad_()
    exact_w = weight.double().requires_grad_()
    y = F.conv2d(
        exact_x.relu() if relu else exact_x,
        exact_w.permute(2, 0, 1).unsqueeze(1),
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=channels,
    )
    dx, dw = torch.autograd.grad(y, (exact_x, exact_w), dy.double())
    nhwc = torch.channels_last
    x, dy = x.contiguous(memory_format=nhwc), dy.contiguous(memory_format=nhwc)
    return Truth(x, weight, dy, y.detach(), dx, dw)


def check(
    launcher: Launcher,
    device: torch.device,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    dilation: int,
    stride: int,
    relu: bool,
) -> None:
    """Forward and both gradients with the default tiles."""
    geometry = {"dilation": dilation, "stride": stride, "relu": relu}
    case = truth(shape, dtype, device, **geometry)
    y = depthwise_forward(case.x, case.weight, **geometry, launcher=launcher)
    dx, dw = depthwise_backward(case.x, case.weight, case.dy, **geometry, launcher=launcher)
    assert_close(y, case.y, dtype)
    assert_close(dx, case.dx, dtype)
    assert_close(dw, case.dw, torch.float32, case.dy.numel() // shape[1])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_forward_and_backward(
    launcher: Launcher,
    device: torch.device,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    stride: int,
) -> None:
    for dilation in DILATIONS:
        for relu in (False, True):
            geometry = {"dilation": dilation, "stride": stride, "relu": relu}
            case = truth(shape, dtype, device, **geometry)
            y = depthwise_forward(case.x, case.weight, **geometry, launcher=launcher)
            dx, dw = depthwise_backward(case.x, case.weight, case.dy, **geometry, launcher=launcher)
            assert_close(y, case.y, dtype)
            assert_close(dx, case.dx, dtype)
            assert_close(dw, case.dw, torch.float32, case.dy.numel() // shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 8])
def test_large_maps(
    gpu_launcher: Launcher,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    stride: int,
    dilation: int,
) -> None:
    device = torch.device(gpu_launcher.device_type)
    check(gpu_launcher, device, shape, dtype, dilation, stride, relu=True)


def forward_tiles(storage: str, stride: int) -> list[Tile]:
    return [
        Tile(int(one.parameters[1]), int(one.parameters[3]), int(one.parameters[4]), 256)
        for one in instances.all_instances()
        if one.kernel == "depthwise_forward"
        and storage in one.parameters[0]
        and one.parameters[2] == str(stride)
    ]


def backward_tiles(storage: str, stride: int) -> list[Tile]:
    kernel = "depthwise_backward" if stride == 1 else "depthwise_backward_stride2"
    found = []
    for one in instances.all_instances():
        if one.kernel == kernel and storage in one.parameters[0]:
            vector, *walk = map(int, one.parameters[1:])
            columns, rows = walk or (1, 1)
            found.append(Tile(vector, columns, rows, threads=256, blocks=2))
    return found


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_tile_gives_the_same(
    launcher: Launcher, device: torch.device, dtype: torch.dtype, stride: int
) -> None:
    geometry = {"dilation": 3, "stride": stride, "relu": True}
    case = truth((2, 24, 11, 14), dtype, device, **geometry)
    forward = forward_tiles(STORAGE[dtype], stride)
    backward = backward_tiles(STORAGE[dtype], stride)
    assert len(forward) >= 5 and len(backward) >= 3
    for tile in forward:
        y = depthwise_forward(case.x, case.weight, **geometry, tile=tile, launcher=launcher)
        assert_close(y, case.y, dtype)
    for tile in backward:
        dx, dw = depthwise_backward(
            case.x, case.weight, case.dy, **geometry, tile=tile, launcher=launcher
        )
        assert_close(dx, case.dx, dtype)
        assert_close(dw, case.dw, torch.float32, case.dy.numel())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [5, 16])
def test_slices_are_read_and_written_in_place(
    launcher: Launcher, device: torch.device, stride: int, channels: int
) -> None:
    for dilation in (1, 2):
        geometry = {"dilation": dilation, "stride": stride, "relu": True}
        case = truth((2, channels, 6, 7), torch.float32, device, **geometry)
        x = poisoned(tuple(case.x.shape), torch.float32, device)
        x.copy_(case.x)
        dy = poisoned(tuple(case.dy.shape), torch.float32, device)
        dy.copy_(case.dy)
        y = poisoned(tuple(case.y.shape), torch.float32, device)
        dx = poisoned(tuple(case.x.shape), torch.float32, device)
        given = depthwise_forward(x, case.weight, **geometry, out=y, launcher=launcher)
        assert given is y
        assert_close(y, case.y, torch.float32)
        assert_canaries_live(y)
        given, dw = depthwise_backward(x, case.weight, dy, **geometry, out=dx, launcher=launcher)
        assert given is dx
        assert_close(dx, case.dx, torch.float32)
        assert_close(dw, case.dw, torch.float32, 100)
        assert_canaries_live(dx)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("dilation", "stride"), [(1, 1), (2, 2), (3, 2)])
def test_gradients_of_branches_add_up(
    launcher: Launcher, device: torch.device, dilation: int, stride: int, dtype: torch.dtype
) -> None:
    geometry = {"dilation": dilation, "stride": stride, "relu": True}
    case = truth((2, 8, 6, 7), dtype, device, **geometry)
    dx = poisoned(tuple(case.x.shape), dtype, device)
    before = torch.randn(case.x.shape).to(dtype).to(device)
    dx.copy_(before)
    backward = (case.x, case.weight, case.dy)
    given, dw = depthwise_backward(
        *backward, **geometry, out=dx, accumulate=True, launcher=launcher
    )
    assert given is dx
    assert_close(dx, before.double() + case.dx, dtype)
    assert_close(dw, case.dw, torch.float32, case.dy.numel() // 8)
    assert_canaries_live(dx)
    with pytest.raises(ValueError, match="accumulate: there is no"):
        depthwise_backward(*backward, **geometry, accumulate=True, launcher=launcher)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    "dilations, stride", [((1, 2, 4, 8) * 2, 1), ((1, 2, 4, 3, 2), 2), ((2,), 2), ((1, 3) * 9, 1)]
)
def test_branches_of_one_map(
    launcher: Launcher,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dilations: tuple[int, ...],
    stride: int,
    apart: bool,
    dtype: torch.dtype,
) -> None:
    """In launches together, of the gradients too where maps are small."""
    monkeypatch.setattr(depthwise, "APART", 2**21 if apart else 0)
    torch.manual_seed(0)
    channels, geometry = 8, {"stride": stride, "relu": True}
    x = torch.randn(2, 9, 7, channels).to(dtype).to(device).movedim(-1, 1)
    size = -(-9 // stride), -(-7 // stride)
    dy = torch.randn(len(dilations), 2, *size, channels).to(dtype).to(device).movedim(-1, 2)
    weights = [torch.randn(3, 3, channels).to(device) for _ in dilations]
    y = torch.full_like(dy, float("nan"))
    branches = weights, list(dilations)
    branches_forward(x, *branches, y, **geometry, launcher=launcher)
    dx, dw = branches_backward(x, *branches, dy, **geometry, launcher=launcher)
    again = branches_backward(x, *branches, dy, **geometry, launcher=launcher)
    exact_x = x.double().requires_grad_()
    exact_w = [weight.double().requires_grad_() for weight in weights]
    exact = torch.stack(
        [
            F.conv2d(
                exact_x.relu(), w.permute(2, 0, 1)[:, None], None, stride, d, d, groups=channels
            )
            for w, d in zip(exact_w, dilations, strict=True)
        ]
    )
    wanted, *of_windows = torch.autograd.grad(exact, [exact_x, *exact_w], dy.double())
    assert_close(y, exact.detach(), dtype)
    assert_close(dx, wanted, dtype, len(dilations), slack=ROUNDING[dtype] / ROUNDING[torch.float32])
    assert_close(dw, torch.stack(of_windows), torch.float32, dy[0].numel() // channels)
    assert torch.equal(dx, again[0]) and torch.equal(dw, again[1])


def test_branches_that_do_not_match_are_named(emulated: Launcher) -> None:
    x, weights = good()["x"], [torch.zeros(3, 3, 4)] * 2
    y = torch.zeros(2, 1, 5, 6, 4).movedim(-1, 2)
    bad = {
        "out: shape .*, need maps": (weights, [1, 2], y[0]),
        "out: 2 maps for 2 weights and 1 dilations": (weights, [1], y),
        "out: shape": (weights, [1, 2], y[:, :, :2]),
        "dilation: 0": (weights, [1, 0], y),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            branches_forward(x, *arguments, launcher=emulated)
    with pytest.raises(ValueError, match="dys: 1 maps for 2 weights"):
        branches_backward(x, weights, [1, 2], y[:1], launcher=emulated)


def test_the_same_inputs_give_the_same_bits(launcher: Launcher, device: torch.device) -> None:
    case = truth((3, 12, 10, 9), torch.bfloat16, device, dilation=2, relu=True)
    runs = [
        depthwise_backward(case.x, case.weight, case.dy, dilation=2, relu=True, launcher=launcher)
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", STORAGE)
def test_relu_keeps_nan_and_blocks_the_gradient_at_zero(
    launcher: Launcher, device: torch.device, dtype: torch.dtype
) -> None:
    x = torch.tensor([float("nan"), -1.0, 0.0, 2.0], dtype=dtype, device=device)
    x = x.reshape(1, 1, 1, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(3, 3, 1, device=device)
    weight[1, 1] = 1
    y = depthwise_forward(x, weight, relu=True, launcher=launcher).flatten().tolist()
    assert y[0] != y[0] and y[2:] == [0.0, 2.0]
    dx, _ = depthwise_backward(x, weight, torch.ones_like(x), relu=True, launcher=launcher)
    assert dx.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(gpu_launcher: Launcher) -> None:
    shape = (2, 64, 4100, 4100)
    x = torch.zeros(shape, dtype=torch.bfloat16, device=gpu_launcher.device_type)
    x = x.contiguous(memory_format=torch.channels_last)
    x[1, :, -2:, -2:] = 1
    weight = torch.ones(3, 3, 64, device=gpu_launcher.device_type)
    y = depthwise_forward(x, weight, launcher=gpu_launcher)
    assert (y[1, :, -1, -1] == 4).all() and (y[0, :, -1, -1] == 0).all()
    dx, dw = depthwise_backward(x, weight, y, launcher=gpu_launcher)
    assert (dx[1, :, -1, -1] == 16).all()
    assert (dw[1, 1] == 16).all()


def good() -> dict[str, object]:
    x = torch.zeros(1, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    return {"x": x, "weight": torch.zeros(3, 3, 4)}


BAD = {
    "x: need a map": {"x": torch.zeros(4, 5, 6)},
    "x: empty map": {"x": torch.zeros(0, 4, 5, 6)},
    "x: dtype torch.float64": {"x": torch.zeros(1, 4, 5, 6, dtype=torch.float64)},
    "x: strides": {"x": torch.zeros(1, 4, 5, 6)},
    "x: on meta": {"x": torch.zeros(1, 4, 5, 6, device="meta")},
    "weight: shape": {"weight": torch.zeros(4, 1, 3, 3)},
    "weight: dtype": {"weight": torch.zeros(3, 3, 4, dtype=torch.bfloat16)},
    "weight: strides": {"weight": torch.zeros(3, 4, 3).transpose(1, 2)},
    "stride: 3": {"stride": 3},
    "tile: .* no compiled kernel": {"tile": Tile(3, 1, 4, 128)},
    "tile: .* 1 to 512 threads": {"tile": Tile(2, 1, 4, 513)},
    "no vector of": {
        "tile": Tile(4, 1, 4, 128),
        "x": torch.zeros(1, 5, 6, 5).permute(0, 3, 1, 2)[:, 1:],
    },
    "dilation: 0": {"dilation": 0},
    "out: shape": {"out": torch.zeros(1, 4, 5, 5)},
    "out: strides": {"out": torch.zeros(1, 4, 5, 6)},
    "out: with strides": {"out": torch.zeros(1, 1, 1, 4).permute(0, 3, 1, 2).expand(1, 4, 5, 6)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(emulated: Launcher, message: str) -> None:
    arguments = {**good(), **BAD[message], "launcher": emulated}
    with pytest.raises(ValueError, match=message):
        depthwise_forward(**arguments)


def test_a_gradient_of_another_shape_is_refused(emulated: Launcher) -> None:
    dy = torch.zeros(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="dy: shape"):
        depthwise_backward(**good(), dy=dy, launcher=emulated)
