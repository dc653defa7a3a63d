"""Tables fitted to whole networks, and their check, on engines of known cost."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch

from lgcnet_fast.errors import GenotypeError, TableError
from lgcnet_fast.latency.build import build_table
from lgcnet_fast.latency.check import UNIFORM, VARIED, CheckedNetwork, check_predictions
from lgcnet_fast.latency.design import RANDOM_EVERY, fitting_genotypes
from lgcnet_fast.latency.engine_table import FitEffort, build_engine_table
from lgcnet_fast.latency.genotypes import (
    fingerprint,
    light_genotype,
    uniform_genotypes,
    varied_genotypes,
)
from lgcnet_fast.latency.networks import FrameTimer
from lgcnet_fast.latency.predict import latency_range, latency_scale, predict_ms
from lgcnet_fast.latency.providers import RooflineProvider
from lgcnet_fast.latency.table import check_table, load_table, save_table
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import make_space
from tests.latency.fake_engines import FakeTimer, fused_ms

SIZE = (97, 193)
SPACE = make_space({"name": "lgcnet", "cells": 6, "reductions": [1, 3], "widths": [8, 16, 32]})


@pytest.fixture(scope="module")
def exact():
    """A table fitted to engines without noise."""
    return build_engine_table(SPACE, SIZE, 19, FakeTimer(), FitEffort(networks=240))


@pytest.fixture(scope="module")
def noisy():
    """One whose networks were timed with 1 % noise."""
    return build_engine_table(SPACE, SIZE, 19, FakeTimer(0.01), FitEffort(networks=240))


def model_of(table):
    return SPACE.latency_model(table.milliseconds, SIZE, 19)


# -- the fit --------------------------------------------------------------------------------------


def test_fusion_savings_are_recovered(exact):
    check = check_predictions(exact, SPACE, FakeTimer(), count=100)
    for summary in check.summary().values():
        assert summary["worst_error_pct"] < 1
        assert summary["rank_correlation"] > 0.995
    assert exact.fit.networks == 240 and exact.fit.worst_error < 0.02


def test_an_operation_costs_what_it_adds(exact):
    """Changing one operation of an engine changes the prediction by as much as the engine."""
    genotype = next(uniform_genotypes(SPACE, 7))
    for edge, op in ((0, "conv3"), (2, "skip"), (4, "sep3"), (3, "none")):
        cells = [list(cell) for cell in genotype.cells]
        cells[4][edge] = op
        changed = SPACE.Genotype.model_validate(genotype.model_dump() | {"cells": cells})
        model = model_of(exact)
        predicted = predict_ms(SPACE, model, changed) - predict_ms(SPACE, model, genotype)
        assert predicted == pytest.approx(fused_ms(changed) - fused_ms(genotype), abs=0.1)


def test_noise_is_averaged_away(noisy):
    check = check_predictions(noisy, SPACE, FakeTimer(), count=50)
    for summary in check.summary().values():
        assert summary["median_error_pct"] < 1 and summary["worst_error_pct"] < 4


def test_the_errors_of_networks_left_out_are_honest(noisy):
    """1 % of noise in what is predicted alone gives a median of 0.67 %."""
    assert 0.006 < noisy.fit.median_error < 0.015
    assert noisy.fit.median_error < noisy.fit.worst_error < 0.06


def test_the_latency_is_differentiable_and_linear_in_each_row(exact):
    model = model_of(exact)
    z = {
        group.name: torch.rand(len(group.rows), len(group.options)).softmax(-1)
        for group in SPACE.arch_groups()
    }
    z["cells"].requires_grad_()
    model(z).total.backward()
    assert (z["cells"].grad != 0).any(-1).all()
    with torch.no_grad():
        row = z["cells"][7].clone()
        totals = []
        for pick in torch.eye(8):
            z["cells"][7] = pick
            totals.append(model(z).total)
        z["cells"][7] = row
        torch.testing.assert_close(model(z).total, row @ torch.stack(totals))


def test_cells_and_edges_sum_to_the_searchable_part(exact):
    terms = model_of(exact)(SPACE.one_hot(next(uniform_genotypes(SPACE, 3))))
    torch.testing.assert_close(terms.cells.sum(), terms.edges.sum())
    assert len(terms.edges) == 30 + 13 and len(terms.cells) == 7


def test_scale_and_range_work_on_engine_tables(exact):
    """The scale's mean at uniform Z is that of random networks."""
    model = model_of(exact)
    drawn = [fused_ms(genotype) for genotype in islice(uniform_genotypes(SPACE, 5), 300)]
    assert latency_scale(SPACE, model) == pytest.approx(16.2 * 300 / sum(drawn), rel=0.02)
    reachable = latency_range(SPACE, model)
    assert reachable.low <= min(drawn) * 1.01 and reachable.high >= max(drawn) * 0.99


def test_a_space_without_engine_keys_of_its_own_is_fitted_too(space):
    class Timer(FakeTimer):
        def milliseconds(self, genotype):
            (first, second), (depth,) = genotype.picks
            costs = (0.0, 1.0, 4.0, 2.0)
            return 0.5 + costs[first] + costs[second] * depth

    table = build_engine_table(space, (12, 20), 5, Timer(), FitEffort(networks=12, bases=8))
    check = check_predictions(table, space, Timer(), count=20)
    assert check.summary()[UNIFORM]["worst_error_pct"] < 1


def test_a_table_fitted_to_every_genotype_cannot_be_checked(space):
    class Timer(FakeTimer):
        def milliseconds(self, genotype):
            return 1.0 + sum(map(sum, genotype.picks))

    table = build_engine_table(space, (12, 20), 5, Timer(), FitEffort(networks=100, bases=8))
    assert table.fit.networks == 18
    with pytest.raises(TableError, match="fitted to nearly every genotype"):
        check_predictions(table, space, Timer(), count=2)


def test_only_networks_that_are_ready_in_time_are_measured():
    effort = FitEffort(networks=40, preparation_seconds=0.0, fewest_ready=12)
    reports = []
    timer = FakeTimer()
    table = build_engine_table(
        SPACE, SIZE, 19, timer, effort, lambda *report: reports.append(report)
    )
    assert table.fit.networks == timer.prepared == len(timer.asked) == 12
    assert reports == [(12, 40), *((done, 12) for done in range(1, 13))]


def test_the_time_limit_ends_the_measurement():
    effort = FitEffort(networks=40, most_seconds=0.0, fewest=12)
    reports = []
    table = build_engine_table(
        SPACE, SIZE, 19, FakeTimer(), effort, lambda *report: reports.append(report)
    )
    assert table.fit.networks == 12 and reports[-1] == (12, 40)


# -- the file -------------------------------------------------------------------------------------


def test_an_engine_table_serves_runs_from_its_file(exact, tmp_path):
    path = tmp_path / "engine.json"
    save_table(exact, path)
    loaded = load_table(path)
    assert loaded == exact
    assert check_table(loaded, "t.json", SPACE, SIZE, 19, "Fake GPU") == ()
    assert len(loaded.fit.genotypes) == 240
    with pytest.raises(TableError, match="lacks"):
        check_table(loaded.model_copy(update={"fit": None}), "t.json", SPACE, SIZE, 19, "")


def test_it_warns_on_another_device_naming_both(exact):
    (warning,) = check_table(exact, "t.json", SPACE, SIZE, 19, "Other GPU")
    assert "Fake GPU" in warning and "Other GPU" in warning


# -- the design -----------------------------------------------------------------------------------


def combinations(genotype) -> set[tuple[int, str, tuple[str, ...]]]:
    """What an engine fuses: the operations into each node."""
    nodes = {"x1": slice(0, 2), "x2": slice(2, 5)}
    return {
        (cell, node, ops[edges])
        for cell, ops in enumerate(genotype.cells)
        for node, edges in nodes.items()
    }


def test_mixtures_are_made_of_the_combinations_of_the_bases():
    genotypes = fitting_genotypes(SPACE, bases=8, networks=100)
    assert len(set(map(fingerprint, genotypes))) == 100
    bases = set().union(*map(combinations, genotypes[:8]))
    mixtures = [g for i, g in enumerate(genotypes[8:], start=1) if i % RANDOM_EVERY]
    new = set().union(*map(combinations, mixtures)) - bases
    # Only repairs of networks that would be cut off add any.
    assert len(bases) > 80 and len(new) < 0.1 * len(bases)


def test_random_networks_add_combinations():
    genotypes = fitting_genotypes(SPACE, bases=8, networks=100)
    bases = set().union(*map(combinations, genotypes[:8]))
    for genotype in genotypes[7 + RANDOM_EVERY :: RANDOM_EVERY]:
        assert len(combinations(genotype) - bases) >= 2


def test_bases_are_balanced():
    genotypes = fitting_genotypes(SPACE, bases=16, networks=16)
    for row in range(SPACE.one_hot(genotypes[0])["cells"].shape[0]):
        counts = sum(SPACE.one_hot(genotype)["cells"][row] for genotype in genotypes)
        assert counts.sum() == 16 and counts.max() <= 4
    fusion = sum(SPACE.one_hot(genotype)["fusion"] for genotype in genotypes)
    assert (fusion >= 1).all() and (fusion <= 2).all()


def test_mixtures_vary_in_their_share_of_light_operations():
    light = SPACE.arch_groups()[0].light
    shares = [
        sum(op in light for cell in genotype.cells for op in cell) / 30
        for genotype in fitting_genotypes(SPACE, bases=16, networks=150)[16:]
    ]
    assert min(shares) < 0.2 and max(shares) > 0.5


def test_masks_hold_in_the_design(space):
    genotypes = fitting_genotypes(space, bases=8, networks=100)
    assert len(genotypes) == 18
    assert {genotype.picks[0][1] for genotype in genotypes} == {0, 1, 2}


def test_everything_is_prepared_before_the_first_measurement():
    class Timer(FakeTimer):
        def milliseconds(self, genotype):
            assert self.prepared >= 12
            return super().milliseconds(genotype)

    build = FitEffort(networks=12, bases=4)
    table = build_engine_table(SPACE, SIZE, 19, Timer(), build)
    check_predictions(table, SPACE, Timer(), count=6)


class Interrupted(FakeTimer):
    """Somebody presses Ctrl-C while network `at` is measured."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def milliseconds(self, genotype):
        if len(self.asked) == self.at:
            raise KeyboardInterrupt
        return super().milliseconds(genotype)


def test_an_interrupt_keeps_what_is_measured(exact):
    effort = FitEffort(networks=30, bases=4, fewest=10)
    table = build_engine_table(SPACE, SIZE, 19, Interrupted(at=20), effort)
    assert table.fit is not None and table.fit.networks == 20
    with pytest.raises(KeyboardInterrupt):
        build_engine_table(SPACE, SIZE, 19, Interrupted(at=9), effort)
    check = check_predictions(exact, SPACE, Interrupted(at=3), count=5)
    assert check.summary()[UNIFORM]["networks"] == 3 and VARIED not in check.groups
    with pytest.raises(KeyboardInterrupt):
        check_predictions(exact, SPACE, Interrupted(at=0), count=5)


# -- genotypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_light_operations_is_as_asked(share):
    generator = torch.Generator().manual_seed(0)
    light = SPACE.arch_groups()[0].light
    drawn = [light_genotype(SPACE, share, generator) for _ in range(60)]
    ops = [op for genotype in drawn for cell in genotype.cells for op in cell]
    # Networks whose taps would be cut off are repaired, which swaps a few none edges.
    assert sum(op in light for op in ops) / len(ops) == pytest.approx(share, abs=0.04)
    assert len({op for op in ops}) == 8


def test_masked_options_are_never_drawn(space):
    generator = torch.Generator().manual_seed(0)
    drawn = [light_genotype(space, 0.5, generator) for _ in range(100)]
    assert {genotype.picks[0][1] for genotype in drawn} == {0, 1, 2}


def test_seeds_give_the_same_genotypes_again():
    first, again = (list(islice(varied_genotypes(SPACE, 3), 4)) for _ in range(2))
    assert first == again and len(set(map(fingerprint, first))) == 4


# -- the check ------------------------------------------------------------------------------------


def test_no_network_of_the_fit_is_checked(exact):
    timer = FakeTimer()
    check_predictions(exact, SPACE, timer, count=30)
    assert len(timer.asked) == 60
    assert not set(exact.fit.genotypes) & set(map(fingerprint, timer.asked))


def test_a_genotype_that_the_table_was_fitted_to_is_passed_over(exact):
    drawn = next(uniform_genotypes(SPACE, 1001))
    fit = exact.fit.model_copy(update={"genotypes": (fingerprint(drawn),)})
    timer = FakeTimer()
    check_predictions(exact.model_copy(update={"fit": fit}), SPACE, timer, count=3)
    assert drawn not in timer.asked and len(timer.asked) == 6


def test_given_genotypes_form_their_own_group(exact):
    genotype = next(uniform_genotypes(SPACE, 5))
    seen = []
    check = check_predictions(
        exact, SPACE, FakeTimer(), 2, {"mine": genotype}, lambda *report: seen.append(report)
    )
    assert list(check.groups) == [UNIFORM, VARIED, "given"]
    assert seen == [(5, 5), *((i + 1, 5) for i in range(5))]
    (mine,) = check.groups["given"]
    assert mine.name == "mine" and mine.measured_ms == fused_ms(genotype)
    values = json.loads(json.dumps(check.as_json(), allow_nan=False))
    assert values["summary"]["given"]["rank_correlation"] is None
    assert values["measured_on"]["device"] == "Fake GPU"


def test_a_genotype_of_another_space_is_refused_before_anything_is_measured(exact):
    timer = FakeTimer()
    with pytest.raises(GenotypeError):
        check_predictions(exact, SPACE, timer, 2, {"reference": load_genotype("reference")})
    assert timer.asked == []


def test_errors_of_the_searchable_part():
    network = CheckedNetwork("n", predicted_ms=11, constant_ms=6, measured_ms=10)
    assert network.error == pytest.approx(0.1)
    assert network.searchable_error == pytest.approx(0.25)
    nothing_left = CheckedNetwork("n", predicted_ms=11, constant_ms=10, measured_ms=10)
    assert nothing_left.searchable_error == float("inf")


def test_tables_of_operations_can_be_checked_too():
    table = build_table(SPACE, SIZE, 19, RooflineProvider())
    check = check_predictions(table, SPACE, FakeTimer(), count=30)
    assert check.summary()[UNIFORM]["rank_correlation"] > 0.3


# -- timing networks ------------------------------------------------------------------------------


def test_a_frame_timer_times_what_it_builds():
    import time

    built = []

    def build(genotype):
        built.append(genotype)
        return lambda: time.sleep(2e-3)

    made_on = FakeTimer().provenance().model_copy(update={"batch": 2})
    timer = FrameTimer(build, torch.device("cpu"), made_on)
    assert 1 <= timer.milliseconds("genotype") < 20
    assert built == ["genotype"] and timer.provenance() is made_on
