"""Scale, range and predictions."""

import pytest
import torch

from lgcnet_fast.errors import ConfigError
from lgcnet_fast.latency.build import build_table, open_table
from lgcnet_fast.latency.predict import (
    LatencyRange,
    check_target,
    latency_range,
    latency_scale,
    predict_ms,
    uniform_arch,
)
from lgcnet_fast.latency.providers import RooflineProvider
from lgcnet_fast.space.registry import make_space

SIZE = (12, 20)
SMALL = {
    "name": "lgcnet",
    "cells": 4,
    "reductions": [1, 2],
    "taps": [0, 1, 3],
    "widths": [8, 16, 32],
}
COSTS = (1.0, 4.0, 2.0)
"""Milliseconds of conv1, conv3 and depthwise."""
CONSTANT = 0.5


@pytest.fixture
def model(space):
    keys = tuple(dict.fromkeys(space.lut_keys(SIZE, 5)))
    return space.latency_model(dict(zip(keys, (*COSTS, CONSTANT), strict=True)), SIZE, 5)


def test_uniform_weights_leave_masked_options_out(space):
    arch = uniform_arch(space)
    assert arch["ops"].tolist() == [[0.25] * 4, pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])]
    assert arch["depth"].tolist() == [[0.5, 0.5]]


def test_the_scale_brings_the_mean_of_random_architectures_to_the_paper(space, model):
    mean = CONSTANT + 7 / 4 + 0.5 * 5 / 3
    assert latency_scale(space, model) == pytest.approx(16.2 / mean)
    generator = torch.Generator().manual_seed(0)
    drawn = [predict_ms(space, model, space.random_genotype(generator)) for _ in range(3000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.03)


def test_a_prediction_is_the_sum_of_the_picked_entries(space, model):
    genotype = space.Genotype(picks=((2, 1), (1,)))
    assert predict_ms(space, model, genotype) == pytest.approx(CONSTANT + 4 + 1)
    shallow = space.Genotype(picks=((3, 2), (0,)))
    assert predict_ms(space, model, shallow) == pytest.approx(CONSTANT + 2)


def test_the_range_is_that_of_the_valid_genotypes(space, model):
    """The first row must not be none, and depthwise is masked out of the second."""
    all_of_them = [
        predict_ms(space, model, space.Genotype(picks=((a, b), (d,))))
        for a in (1, 2, 3)
        for b in (0, 1, 2)
        for d in (0, 1)
    ]
    found = latency_range(space, model)
    assert (found.low, found.high) == pytest.approx((min(all_of_them), max(all_of_them)))


def test_a_target_outside_the_range_is_refused_with_the_range():
    reachable = LatencyRange(2.0, 8.5)
    check_target(2.0, reachable)
    check_target(8.5, reachable)
    for target in (1.99, 8.51):
        with pytest.raises(ConfigError, match=f"{target}.*2.000 to 8.500 ms"):
            check_target(target, reachable)


def test_a_table_of_zeros_has_no_scale(space):
    keys = space.lut_keys(SIZE, 5)
    model = space.latency_model(dict.fromkeys(keys, 0.0), SIZE, 5)
    with pytest.raises(ConfigError, match="0 ms"):
        latency_scale(space, model)


def test_lgcnet_range_bounds_random_genotypes():
    space = make_space(
        {
            "name": "lgcnet",
            "cells": 4,
            "reductions": [1, 2],
            "taps": [0, 1, 3],
            "widths": [8, 16, 32],
        }
    )
    table, _ = open_table("roofline_titanxp", space, (97, 193), 19, torch.device("cpu"))
    model = space.latency_model(table.milliseconds, (97, 193), 19)
    reachable = latency_range(space, model)
    generator = torch.Generator().manual_seed(0)
    drawn = [predict_ms(space, model, space.random_genotype(generator)) for _ in range(100)]
    assert model.constant < reachable.low <= min(drawn) <= max(drawn) <= reachable.high


@pytest.mark.slow
def test_the_paper_network_needs_hardly_any_scaling():
    """On the estimated Titan Xp random networks take what the paper measured on a real one."""
    space = make_space({"name": "lgcnet"})
    table = build_table(space, (769, 1537), 19, RooflineProvider())
    model = space.latency_model(table.milliseconds, (769, 1537), 19)
    assert latency_scale(space, model) == pytest.approx(1, abs=0.25)
