"""Walks of the depthwise kernels: segments that end inside a chain, past the last, or hold none."""

from __future__ import annotations

import pytest
import torch

from lgcnet_fast.kernels.depthwise import ForwardConfig, default_block, depthwise_multi, share_rows
from lgcnet_fast.kernels.depthwise_weight_grad import WeightGradConfig, depthwise_multi_weight_grad
from tests.kernels.test_depthwise import (
    Case,
    assert_close,
    inputs,
    reference,
    reference_gradients,
)

DILATIONS = (1, 2, 3, 5)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", [2, 7])
def test_any_share_of_the_rows(
    height: int, stride: int, rows: int, device: torch.device, guarded: None
) -> None:
    case = Case((1, 2, height, 3), DILATIONS, stride)
    x, weights, dy = inputs(case, torch.bfloat16, device)
    forward = ForwardConfig(rows, block_p=4, block_c=2, warps=1)
    y = depthwise_multi(x, weights, DILATIONS, stride, True, config=forward)
    assert_close(y, reference(x, weights, case), reference(x.abs(), weights.abs(), case))
    config = WeightGradConfig(rows, block_p=4, block_c=2, warps=1, programs=2)
    dw = depthwise_multi_weight_grad(dy, x, weights, DILATIONS, stride, True, config=config)
    _, truth = reference_gradients(x, weights, dy, case)
    _, magnitude = reference_gradients(x.abs(), weights.abs(), dy.abs(), case)
    assert_close(dw, truth, magnitude)


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_not_finite_stays_in_its_window(relu: bool, device: torch.device) -> None:
    case = Case((1, 2, 7, 3), (1, 2, 3), relu=relu)
    for value in (torch.nan, torch.inf, -torch.inf):
        x, weights, _ = inputs(case, torch.bfloat16, device)
        x[0, 1, 3, 1] = value
        config = ForwardConfig(rows=3, block_p=4, block_c=2, warps=1)
        y = depthwise_multi(x, weights, case.dilations, 1, relu, config=config)
        assert torch.equal(y.isfinite(), reference(x, weights, case).isfinite())


@pytest.mark.parametrize(
    ("shape", "maps", "rows", "programs"),
    [
        ((16, 32, 64, 128), 8, 64, 32),
        ((16, 64, 32, 64), 8, 32, 16),
        ((16, 128, 16, 32), 8, 16, 8),
        ((16, 64, 32, 64), 4, 32, 32),
        ((1, 1, 1, 1), 2, 1, 1),
    ],
)
def test_default_walks_fill_the_cores_once(
    shape: tuple[int, int, int, int], maps: int, rows: int, programs: int
) -> None:
    config = WeightGradConfig.default((1, maps, *shape), (1,) * maps, stride=1)
    assert (config.rows, config.programs) == (rows, programs)


def test_tiles_fit_the_map() -> None:
    assert default_block(128, 32) == (16, 32)
    assert default_block(64, 48) == (32, 16)
    assert default_block(3, 3) == (4, 4)
    assert default_block(1, 1) == (2, 1)
    assert default_block(128, 144, spare=1 / 8) == (16, 32)
    assert share_rows(64, 1) == 64
    assert share_rows(64, 4) == 16
    assert share_rows(5, 100) == 5
