"""Tables built through providers."""

import pytest
import torch

from lgcnet_fast.errors import ConfigError, TableError
from lgcnet_fast.latency.build import build_table, open_table
from lgcnet_fast.latency.hardware import device_name
from lgcnet_fast.latency.measure import Effort
from lgcnet_fast.latency.providers import RUNTIMES, EagerProvider, check_runtime
from lgcnet_fast.latency.shipped import find_table, shipped_tables
from lgcnet_fast.latency.table import save_table
from lgcnet_fast.space.registry import make_space

SIZE = (12, 20)
SMALL = {
    "name": "lgcnet",
    "cells": 4,
    "reductions": [1, 2],
    "taps": [0, 1, 3],
    "widths": [8, 16, 32],
}
CPU = torch.device("cpu")
QUICK = Effort(warm_up=1, fewest=5, spread=1.0, most_seconds=0.01)


def test_every_key_once_with_progress(space):
    reports = []
    provider = EagerProvider(CPU, effort=QUICK)
    table = build_table(space, SIZE, 5, provider, lambda *report: reports.append(report))
    keys = space.lut_keys(SIZE, 5)
    assert len(keys) == 5 and len(table.entries) == 4
    assert set(table.milliseconds) == set(keys)
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(entry.median_ms > 0 and entry.runs >= 5 for entry in table.entries)
    assert (table.space, tuple(table.size), table.num_classes) == ("toy", SIZE, 5)
    assert table.options == {"channels": 8, "temperature": 1.0}


def test_provenance_of_a_measured_table(space):
    made = build_table(space, SIZE, 5, EagerProvider(CPU, effort=QUICK)).made_on
    assert (made.provider, made.runtime, made.batch) == ("measured", "eager", 1)
    assert made.torch == torch.__version__ and made.dtype == "float32" and made.device


def test_a_batch_of_eight_gives_the_time_of_one_image(space):
    seen = []

    class Watching(EagerProvider):
        def measure(self, lut):
            lut.module.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
            return super().measure(lut)

    provider = Watching(CPU, batch=8, effort=QUICK)
    table = build_table(space, SIZE, 5, provider)
    assert set(seen) == {8}
    assert table.made_on.provider == "measured_batch8" and table.made_on.batch == 8


def test_an_unknown_runtime_names_the_nearest():
    for name in RUNTIMES:
        check_runtime(name)
    with pytest.raises(ConfigError, match="'deploi' of a latency table; did you mean 'deploy'"):
        check_runtime("deploi")


def test_half_precision_is_measured_in_half_precision(space):
    seen = set()

    class Watching(EagerProvider):
        def measure(self, lut):
            lut.module.register_forward_pre_hook(lambda m, inputs: seen.add(inputs[0].dtype))
            return super().measure(lut)

    table = build_table(space, SIZE, 5, Watching(CPU, effort=QUICK, dtype=torch.bfloat16))
    assert seen == {torch.bfloat16} and table.made_on.dtype == "bfloat16"


def test_shipped_tables_open_by_name_and_serve_their_space():
    for name in shipped_tables():
        table = find_table(name)
        space = make_space({"name": table.space, **table.options})
        opened, warnings = open_table(name, space, table.size, table.num_classes, CPU)
        assert opened == table
        (warning,) = warnings
        assert table.made_on.device in warning and device_name(CPU) in warning


def test_an_unknown_table_names_the_nearest(tmp_path):
    with pytest.raises(TableError, match="'eager_h200'.*did you mean 'eager_h200_360x480'"):
        find_table("eager_h200")
    with pytest.raises(TableError, match="nowhere.json: cannot read"):
        find_table(str(tmp_path / "nowhere.json"))


def test_the_roofline_opens_by_name_and_is_the_same_every_time(space):
    first, warnings = open_table("roofline_titanxp", space, SIZE, 5, CPU)
    again, _ = open_table("roofline_titanxp", space, SIZE, 5, CPU)
    assert first == again and warnings == ()
    assert all(entry.spread == 0 for entry in first.entries)


def test_a_file_opens_and_is_checked(space, tmp_path):
    path = tmp_path / "table.json"
    save_table(build_table(space, SIZE, 5, EagerProvider(CPU, effort=QUICK)), path)
    table, warnings = open_table(str(path), space, SIZE, 5, CPU)
    assert warnings == () and len(table.entries) == 4
    with pytest.raises(TableError, match="table.json: built for input 12x20"):
        open_table(str(path), space, (13, 20), 5, CPU)


def test_lgcnet_on_the_roofline():
    space = make_space(
        {
            "name": "lgcnet",
            "cells": 4,
            "reductions": [1, 2],
            "taps": [0, 1, 3],
            "widths": [8, 16, 32],
        }
    )
    table, _ = open_table("roofline_titanxp", space, (97, 193), 19, CPU)
    model = space.latency_model(table.milliseconds, (97, 193), 19)
    assert model.constant > 0
    by_op = {entry.op: entry.median_ms for entry in table.entries if entry.op.startswith("cell.")}
    assert "cell.none" not in by_op
    assert by_op["cell.skip"] > 0
    assert by_op["cell.sep3"] > by_op["cell.dil3_2"] == by_op["cell.dil3_8"]
