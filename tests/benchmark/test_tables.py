"""Tables of engines with the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch

from lgcnet_fast.benchmark import tables
from lgcnet_fast.benchmark.tables import check_latencies, make_table
from lgcnet_fast.errors import BackendError, ConfigError, TableError
from lgcnet_fast.latency.design import fitting_genotypes
from lgcnet_fast.latency.engine_table import FitEffort
from lgcnet_fast.space.registry import make_space

CPU = torch.device("cpu")
SIZE = (33, 65)


@pytest.fixture
def small():
    options = {"cells": 3, "reductions": [1, 2], "taps": [0, 1, 2], "widths": [4, 8, 16]}
    return make_space({"name": "lgcnet", **options})


@pytest.fixture(autouse=True)
def little_effort(monkeypatch):
    monkeypatch.setattr(tables, "FULL_FIT", FitEffort(networks=10, bases=4))


def test_a_backend_that_cannot_serve_is_refused(small):
    with pytest.raises(BackendError):
        make_table(small, SIZE, 3, "deploy", CPU, backend="cuda")


def test_the_backend_is_recorded_and_used_again(small, monkeypatch):
    table = make_table(small, SIZE, 3, "deploy", CPU, backend="reference")
    assert table.made_on.backend == "reference" and "backend reference" in table.description
    seen = []
    original = tables.engine_timer

    def watched(*given, **options):
        seen.append(options)
        return original(*given, **options)

    monkeypatch.setattr(tables, "engine_timer", watched)
    check_latencies(table, small, CPU, count=1)
    assert seen == [{"backend": "reference"}]


def test_what_cannot_be_made_or_measured_is_refused(small):
    with pytest.raises(ConfigError, match="did you mean 'deploy'"):
        make_table(small, SIZE, 3, "deplyo", CPU)
    roofline = make_table(small, SIZE, 3, "roofline", CPU)
    with pytest.raises(ConfigError, match="cannot be measured; say with --runtime"):
        check_latencies(roofline, small, CPU)
    odd = roofline.made_on.model_copy(update={"dtype": "int4", "runtime": "eager"})
    with pytest.raises(TableError, match="'int4'"):
        check_latencies(roofline.model_copy(update={"made_on": odd}), small, CPU)


@pytest.mark.gpu
def test_a_table_of_fused_engines_on_a_gpu(small, monkeypatch):
    """Of as few combinations of operations as there can be: each takes seconds to compile.

    How exact tables are, tests/latency tells, where nothing else runs on the device.
    """
    effort = FitEffort(networks=10, bases=2)
    monkeypatch.setattr(tables, "FULL_FIT", effort)
    device = torch.device("cuda")
    table = make_table(small, (65, 129), 3, "deploy", device, "fp16", backend="triton")
    assert table.made_on.dtype == "float16" and table.made_on.backend == "triton"
    assert table.fit.networks == effort.networks == effort.fewest
    known = fitting_genotypes(small, effort.bases, effort.networks)[0]
    check = check_latencies(table, small, device, count=0, given={"known": known})
    (network,) = check.groups["given"]
    assert network.measured_ms > 0
    assert 0.1 < network.predicted_ms / network.measured_ms < 10
