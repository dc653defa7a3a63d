"""Plain networks and losses compute what the package's references do, without its operations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from bench.genotypes import RANDOM, genotype_named
from bench.stock.losses import hardest_pixels_loss, resized_cross_entropy
from bench.stock.networks import compile_cells, plain
from bench.training.command import TINY_SPACE
from lgcnet_fast.latency.predict import uniform_arch
from lgcnet_fast.ops import upsample_cross_entropy, upsample_ohem
from lgcnet_fast.space.lgcnet import LGCNet
from lgcnet_fast.space.registry import make_space
from tests.train.tape import Tape

SIZE = (33, 49)


def supernet() -> tuple[torch.nn.Module, tuple[Tensor, dict[str, Tensor]]]:
    torch.manual_seed(0)
    space = make_space({"name": "lgcnet", **TINY_SPACE})
    z = {name: rows.double() for name, rows in uniform_arch(space, torch.device("cpu")).items()}
    network = space.build_supernet(5).double().train()
    return network, (torch.randn(2, 3, *SIZE, dtype=torch.float64), z)


def derived() -> tuple[torch.nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    network = LGCNet.build(genotype_named(RANDOM[3], TINY_SPACE), 5).double().train()
    return network, (torch.randn(2, 3, *SIZE, dtype=torch.float64),)


@pytest.mark.parametrize("build", [supernet, derived])
def test_plain_network_is_the_same_function(build, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = build()
    twin = plain(copy.deepcopy(network))
    assert twin.state_dict().keys() == network.state_dict().keys()
    logits = network(*inputs)
    logits.square().sum().backward()
    monkeypatch.setattr("lgcnet_fast.ops.backend.Operation.__call__", _refuse)
    again = twin(*inputs)
    again.square().sum().backward()
    torch.testing.assert_close(again, logits)
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def _refuse(*arguments: object) -> None:
    raise AssertionError("the plain network called an operation of the package")


@pytest.mark.parametrize("build", [supernet, derived])
def test_compiling_cells_reaches_all_of_them(build) -> None:
    network, _ = build()
    compile_cells(plain(network))
    compiled = [m for m in network.modules() if m._compiled_call_impl is not None]
    assert len(compiled) == 5 + 3  # cells, fusion cell, stem, classifier


def test_parts_of_a_network_are_compiled_once_each() -> None:
    found = []
    for part in range(3):
        network, _ = derived()
        compile_cells(plain(network), part, 3)
        modules = enumerate(network.modules())
        found += [index for index, m in modules if m._compiled_call_impl is not None]
    assert len(found) == len(set(found)) == 5 + 3


def test_losses_are_those_of_the_package() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 9, 13, dtype=torch.float64)
    labels = torch.randint(5, (2, *SIZE))
    labels[0, :5] = 255
    expected = upsample_cross_entropy(logits, labels)
    torch.testing.assert_close(resized_cross_entropy(logits, labels), expected)
    for threshold in (0.7, 1e-6):
        expected = upsample_ohem(logits, labels, threshold, 1 / 16)
        found = hardest_pixels_loss(logits, labels, threshold, 1 / 16)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_can_be_captured(dtype: torch.dtype) -> None:
    """Nothing waits for the device, forward or backward."""
    logits = torch.randn(2, 5, 9, 13, dtype=dtype, requires_grad=True)
    labels = torch.randint(5, (2, *SIZE))
    with Tape():
        for in_float32 in (True, False):
            loss = resized_cross_entropy(logits, labels, in_float32)
            loss = loss + hardest_pixels_loss(logits, labels, 0.7, 1 / 16, in_float32)
            torch.autograd.grad(loss, logits)
