"""Running statistics against those that `nn.BatchNorm2d` keeps itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lgcnet_fast.ops import gathered_running_statistics, mixed_norm_sum, use_backend
from lgcnet_fast.ops.running_statistics import update_running_statistics

SHAPES = [(2, 3, 5, 7), (2, 3, 2, 2), (1, 4, 3, 3), (2, 3, 5, 7)]


def norms_and_maps() -> list[tuple[nn.BatchNorm2d, torch.Tensor]]:
    torch.manual_seed(0)
    momenta = (0.1, 0.1, 0.1, 0.3)
    return [
        (nn.BatchNorm2d(shape[1], affine=False, momentum=momentum), torch.randn(shape) + 1)
        for shape, momentum in zip(SHAPES, momenta, strict=True)
    ]


def update(norm: nn.BatchNorm2d, y: torch.Tensor) -> None:
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    update_running_statistics([norm], mean[None], variance[None], y.numel() // y.shape[1])


def assert_as_if_called(found: list[nn.BatchNorm2d], steps: int) -> None:
    for norm, (twin, y) in zip(found, norms_and_maps(), strict=True):
        for _ in range(steps):
            twin(y)
        torch.testing.assert_close(norm.state_dict(), twin.state_dict())


def test_at_once() -> None:
    pairs = norms_and_maps()
    for _ in range(3):
        for norm, y in pairs:
            update(norm, y)
    assert_as_if_called([norm for norm, _ in pairs], 3)


def test_gathered() -> None:
    pairs = norms_and_maps()
    before = copy.deepcopy(pairs[0][0].state_dict())
    for _ in range(2):
        with gathered_running_statistics():
            for norm, y in pairs:
                update(norm, y)
            if not pairs[0][0].num_batches_tracked:
                torch.testing.assert_close(pairs[0][0].state_dict(), before)
    assert_as_if_called([norm for norm, _ in pairs], 2)


def test_a_failed_forward_pass_leaves_them_alone() -> None:
    norm, y = norms_and_maps()[0]
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ZeroDivisionError), gathered_running_statistics():
        update(norm, y)
        raise ZeroDivisionError
    torch.testing.assert_close(norm.state_dict(), before)
    update(norm, y)
    assert norm.num_batches_tracked == 1


def test_gathered_from_fused_nodes(device: torch.device) -> None:
    pairs = norms_and_maps()
    norms = [norm.to(device) for norm, _ in pairs]
    with use_backend("triton"), gathered_running_statistics():
        for norm, (_, y) in zip(norms, pairs, strict=True):
            mixed_norm_sum([y.to(device)], torch.ones(1, device=device), [norm])
    assert_as_if_called([norm.cpu() for norm in norms], 1)
