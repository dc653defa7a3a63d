"""Convolutions whose weights are cast together against autocast's own casts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.nn.autocast_weights import cast_weights
from lgcnet_fast.nn.primitives import DepthwiseSeparable
from lgcnet_fast.ops import use_backend


def network(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 5, 3),
        nn.Conv2d(5, 2, 1),
    ]
    return nn.Sequential(*layers).to(device, memory_format=torch.channels_last)


def outcome(model: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    with use_backend(backend), torch.autocast(x.device.type, torch.bfloat16), cast_weights(model):
        out = model(x)
    out.float().square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {"output": out} | gradients | model.state_dict()


def test_same_bits_as_autocast(device: torch.device) -> None:
    model, x = network(device), torch.randn(2, 3, 6, 7, device=device)
    reference, fused = (outcome(model, x, name) for name in ("reference", "triton"))
    assert list(fused) == list(reference)
    for name, wanted in reference.items():
        assert fused[name].dtype == wanted.dtype and torch.equal(fused[name], wanted), name


def test_parameters_are_back_after_an_error(device: torch.device) -> None:
    model = network(device)
    before = list(model.parameters())
    with (
        pytest.raises(ZeroDivisionError),
        use_backend("triton"),
        torch.autocast(device.type, torch.bfloat16),
        cast_weights(model),
    ):
        assert model[0].weight.dtype == torch.bfloat16 and model[1].weight.dtype == torch.float32
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_branches_and_single_precision_are_left_alone(device: torch.device) -> None:
    model = nn.ModuleList([DepthwiseSeparable(3, 4), nn.Conv2d(3, 4, 1)]).to(device)
    with use_backend("triton"):
        with torch.autocast(device.type, torch.bfloat16), cast_weights(model):
            dtypes = [model[0].depthwise.weight.dtype, model[0].pointwise.weight.dtype]
            assert dtypes == [torch.float32] * 2
            assert model[1].weight.dtype == torch.bfloat16
        with cast_weights(model):
            assert model[1].weight.dtype == torch.float32


def test_networks_without_data_are_left_alone() -> None:
    network = nn.Conv2d(2, 2, 1, device="meta")
    weight = network.weight
    with cast_weights(network):
        assert network.weight is weight
