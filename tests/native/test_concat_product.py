"""Products of concatenations, and gradients, against float64, on every route of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.native.concat_product import concat_product_backward, concat_product_forward
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.mixed_sum import MAX_MAPS
from tests.native.truth import assert_close, nhwc, poisoned_memory

# Images, height, width; channels of the maps, of the product.
CASES = [
    ((1, 9, 15), (48, 48, 48), 48),
    ((2, 3, 5), (64, 4, 100), 64),
    ((3, 7, 13), (16, 8), 12),
    ((1, 5, 29), (5, 1, 37), 35),
    ((1, 1, 1), (1,), 1),
]
LARGE = [
    ((16, 64, 128), (48, 48, 48), 48),
    ((2, 193, 385), (64, 128), 128),
    ((3, 97, 53), (17, 40), 21),
]


@dataclass(frozen=True)
class Case:
    """Operands as the kernels get them; results in float64."""

    maps: list[Tensor]
    weight: Tensor
    dy: Tensor
    relu: bool
    y: Tensor
    dxs: list[Tensor]
    dw: Tensor

    @classmethod
    def make(
        cls,
        extent: tuple[int, int, int],
        channels: Sequence[int],
        outputs: int,
        relu: bool,
        device: torch.device,
    ) -> Case:
        generator = torch.Generator().manual_seed(sum(extent) + outputs)
        images, height, width = extent

        def random_map(count: int) -> Tensor:
            values = torch.randn(images, count, height, width, generator=generator)
            return nhwc(values, device)

        maps, dy = [random_map(count) for count in channels], random_map(outputs)
        weight = torch.randn(outputs, sum(channels), generator=generator) / sum(channels) ** 0.5
        weight = weight.to(device)
        leaves = [one.double().requires_grad_() for one in (*maps, weight)]
        x = torch.cat(leaves[:-1], 1)
        y = torch.einsum("nchw,mc->nmhw", x.relu() if relu else x, leaves[-1])
        *dxs, dw = torch.autograd.grad(y, leaves, dy.double())
        return cls(maps, weight, dy, relu, y.detach(), dxs, dw)

    def run(self, launcher: Launcher) -> list[Tensor]:
        with poisoned_memory():
            y = concat_product_forward(self.maps, self.weight, self.relu, launcher=launcher)
            dxs, dw = concat_product_backward(
                self.dy, self.maps, self.weight, self.relu, launcher=launcher
            )
        return [y, *dxs, dw]

    def check(self, launcher: Launcher) -> None:
        y, *dxs, dw = self.run(launcher)
        assert_close(y, self.y, torch.float32, self.weight.shape[1])
        for dx, exact in zip(dxs, self.dxs, strict=True):
            assert_close(dx, exact, torch.float32, self.weight.shape[0])
            assert dx.is_contiguous(memory_format=torch.channels_last)
        assert_close(dw, self.dw, torch.float32, self.dy.numel() // self.dy.shape[1])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("extent", "channels", "outputs"), CASES)
def test_product_and_gradients(launcher, device, extent, channels, outputs, relu) -> None:
    Case.make(extent, channels, outputs, relu, device).check(launcher)


@pytest.mark.gpu
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("extent", "channels", "outputs"), LARGE)
def test_large_maps(gpu_launcher, extent, channels, outputs, relu) -> None:
    device = torch.device(gpu_launcher.device_type)
    case = Case.make(extent, channels, outputs, relu, device)
    case.check(gpu_launcher)
    again = [case.run(gpu_launcher) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*again, strict=True))


def test_many_shares_of_the_positions(launcher, device, monkeypatch) -> None:
    monkeypatch.setattr("lgcnet_fast.native.concat_product.SHARES", 100)
    Case.make((1, 10, 33), (8, 12), 8, True, device).check(launcher)


def test_unaligned_operands(launcher, device) -> None:
    case = Case.make((1, 3, 5), (8, 4), 8, True, device)

    def moved(tensor: Tensor) -> Tensor:
        flat = tensor.new_empty(tensor.numel() + 1)[1:]
        return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    for name in ("maps", "weight", "dy"):
        one = getattr(case, name)
        operands = {**vars(case), name: [*map(moved, one)] if name == "maps" else moved(one)}
        Case(**operands).check(launcher)


def test_nan(launcher, device) -> None:
    """A ReLU keeps it and passes its gradient on, as PyTorch's does."""
    x = nhwc(torch.tensor([float("nan"), -1.0, 2.0, 0.0]).reshape(1, 1, 1, 4), device)
    ones = torch.ones(1, 1, device=device)
    y = concat_product_forward([x], ones, True, launcher=launcher).flatten().tolist()
    assert y[0] != y[0] and y[1:] == [0, 2, 0]
    dy = nhwc(torch.tensor([3.0, 4.0, 5.0, 6.0]).reshape(1, 1, 1, 4), device)
    (dx,), dw = concat_product_backward(dy, [x], ones, True, launcher=launcher)
    assert dx.flatten().tolist() == [3, 0, 5, 0] and dw.isnan().all()


X, DY, WEIGHT = nhwc(torch.zeros(1, 4, 5, 6)), nhwc(torch.zeros(1, 8, 5, 6)), torch.zeros(8, 8)
BAD = {
    "maps: 0 given": {"maps": []},
    f"maps: 65 given, a launch takes 1 to {MAX_MAPS}": {"maps": [X] * 65},
    r"maps\[1\]: shape \(1, 4, 5, 7\), need \(1, 4, 5, 6\)": {
        "maps": [X, nhwc(torch.zeros(1, 4, 5, 7))]
    },
    r"maps\[0\]: dtype torch.float16": {"maps": [X.half(), X.half()]},
    r"maps\[0\]: strides": {"maps": [X.contiguous(), X]},
    r"maps\[1\]: strides .* not dense": {"maps": [X, DY[:, :4]]},
    r"weight: shape \(8, 8, 1, 1\)": {"weight": WEIGHT[..., None, None]},
    r"weight: shape \(8, 7\), need \(8, 8\)": {"weight": WEIGHT[:, 1:]},
    "weight: strides": {"weight": WEIGHT.t()},
    "weight: dtype": {"weight": WEIGHT.double()},
    r"dy: shape \(1, 4, 5, 6\), need \(1, 8, 5, 6\)": {"dy": X},
    "dy: strides .* not dense": {"dy": nhwc(torch.zeros(1, 9, 5, 6))[:, 1:]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(emulated, message) -> None:
    operands = {"dy": DY, "maps": [X, X], "weight": WEIGHT, **BAD[message]}
    with pytest.raises(ValueError, match=message):
        concat_product_backward(**operands, relu=True, launcher=emulated)
    if "dy" not in BAD[message]:
        del operands["dy"]
        with pytest.raises(ValueError, match=message):
            concat_product_forward(**operands, relu=True, launcher=emulated)
