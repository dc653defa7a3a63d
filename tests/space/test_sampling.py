import pytest
import torch

from lgcnet_fast.space.base import ArchGroup
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.space.sampling import gumbel_softmax


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rows_sum_to_one_and_sharpen_with_the_temperature():
    space = make_space({"name": "lgcnet"})
    arch = space.build_arch()()
    for temperature, sharp in ((1.0, False), (0.03, True)):
        z = gumbel_softmax(arch, temperature, _generator(), space.arch_groups())
        assert {name: rows.shape for name, rows in z.items()} == {
            "cells": (70, 8),
            "fusion": (6, 10),
            "up": (7, 2),
        }
        rows = [row for group in z.values() for row in group]
        assert all(abs(row.sum() - 1) < 1e-5 for row in rows)
        peaked = sum(row.max().item() > 0.9 for row in rows) / len(rows)
        assert (peaked > 0.8) is sharp


def test_the_largest_entry_follows_the_softmax_of_the_logits():
    """The Gumbel-max property: P(argmax = m) = softmax(logits)_m at every temperature."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, 4)
    z = gumbel_softmax({"rows": logits}, 0.5, _generator())["rows"]
    shares = torch.bincount(z.argmax(1), minlength=4) / len(z)
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=0.01, rtol=0)


def test_a_generator_repeats_its_draws():
    arch = {"rows": torch.zeros(5, 8)}
    first, second = (gumbel_softmax(arch, 1.0, _generator(7))["rows"] for _ in range(2))
    assert torch.equal(first, second)
    shared = _generator(7)
    gumbel_softmax(arch, 1.0, shared)
    assert not torch.equal(gumbel_softmax(arch, 1.0, shared)["rows"], first)


def test_noise_is_finite_for_millions_of_draws():
    z = gumbel_softmax({"rows": torch.zeros(500_000, 8)}, 0.03, _generator())["rows"]
    assert torch.isfinite(z).all()


def test_gradients_pass_to_the_logits():
    logits = torch.randn(6, 8, requires_grad=True)
    z = gumbel_softmax({"rows": logits}, 1.0, _generator())["rows"]
    (z * torch.randn(6, 8)).sum().backward()
    assert (logits.grad != 0).all()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(6), atol=1e-6, rtol=0)


def test_masked_options_get_nothing():
    mask = ((True, True, True), (True, True, False))
    group = ArchGroup("depth", ("a", "b"), ("1", "2", "3"), mask)
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 50.0]], requires_grad=True)
    z = gumbel_softmax({"depth": logits}, 0.3, _generator(), (group,))["depth"]
    z.square().sum().backward()
    assert z[1, 2] == 0 and z[0].min() > 0
    torch.testing.assert_close(z.sum(1), torch.ones(2))
    assert torch.isfinite(logits.grad).all() and logits.grad[1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_also_under_autocast(dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = gumbel_softmax({"rows": torch.zeros(3, 8, dtype=dtype)}, 1.0, _generator())["rows"]
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.sum(1), torch.ones(3))
