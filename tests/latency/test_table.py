"""Table files: round trip, validation, refusal to serve the wrong run."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lgcnet_fast.errors import TableError
from lgcnet_fast.latency.build import build_table
from lgcnet_fast.latency.providers import RooflineProvider
from lgcnet_fast.latency.table import (
    LookupTable,
    check_table,
    load_table,
    save_table,
)

SIZE = (12, 20)


@pytest.fixture
def table(space) -> LookupTable:
    return build_table(space, SIZE, 5, RooflineProvider())


@pytest.fixture
def stored(table, tmp_path):
    """The table's JSON, and a function that stores a changed one and loads it."""
    path = tmp_path / "table.json"

    def reload(values):
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return load_table(path)

    return table.model_dump(mode="json"), reload


def test_round_trip(table, tmp_path):
    path = tmp_path / "new" / "table.json"
    save_table(table, path)
    assert load_table(path) == table
    assert load_table(path).milliseconds == table.milliseconds
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]


def test_saving_into_a_file_taken_for_a_folder_is_refused(table, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="cannot write"):
        save_table(table, tmp_path / "file" / "table.json")


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(TableError, match="nowhere.json: cannot read.*lgcnet lut build"):
        load_table(tmp_path / "nowhere.json")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"version": 1}', "NaN"])
def test_garbage_names_the_file(stored, text):
    _, reload = stored
    with pytest.raises(TableError, match="table.json: not a usable latency table"):
        reload(text)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=300))
def test_any_bytes_give_a_table_error(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(TableError):
        load_table(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update(version=2), "version"),
        (lambda t: t.pop("space"), "space"),
        (lambda t: t.update(colour="red"), "unknown key 'colour'"),
        (lambda t: t.update(size=[12]), "size"),
        (lambda t: t["entries"][1].update(median_ms=-0.1), r"entries.1.median_ms"),
        (lambda t: t["entries"][1].update(median_ms=float("nan")), r"entries.1.median_ms"),
        (lambda t: t["entries"][1].update(median_ms=float("inf")), r"entries.1.median_ms"),
        (lambda t: t["entries"][1].update(median_ms="1"), r"entries.1.median_ms"),
        (lambda t: t["entries"][0].pop("op"), r"entries.0.op"),
        (lambda t: t["entries"].append(t["entries"][0]), "more than one entry for 'cell.conv1 8"),
    ],
)
def test_a_wrong_entry_is_named(stored, change, named):
    values, reload = stored
    change(values)
    with pytest.raises(TableError, match=named):
        reload(values)


def test_many_wrong_entries_are_counted(stored):
    values, reload = stored
    values["entries"] = [{"op": 1}] * 1000
    with pytest.raises(TableError, match=r"entries.0.op(.|\n)*and 6995 more") as raised:
        reload(values)
    assert len(str(raised.value)) < 1000


def test_a_table_serves_its_own_run(table, space):
    assert check_table(table, "t.json", space, SIZE, 5, "") == ()
    assert check_table(table, "t.json", space, SIZE, 5, "Some GPU") == ()


def test_another_size_is_refused(table, space):
    with pytest.raises(TableError, match="t.json: built for input 12x20, but .* is 24x40"):
        check_table(table, "t.json", space, (24, 40), 5, "")


def test_another_space_is_refused(table, space):
    foreign = table.model_copy(update={"space": "else"})
    with pytest.raises(TableError, match="built for space 'else', not 'toy'"):
        check_table(foreign, "t.json", space, SIZE, 5, "")


def test_missing_entries_are_refused(table, space):
    with pytest.raises(TableError, match="lacks 1 of 4 entries, the first 'const.head 8->6 12x20"):
        check_table(table, "t.json", space, SIZE, 6, "")
    shorter = table.model_copy(update={"entries": table.entries[2:]})
    with pytest.raises(TableError, match="lacks 2 of 4 entries"):
        check_table(shorter, "t.json", space, SIZE, 5, "")


def test_another_device_and_other_options_are_warnings(table, other_space):
    made_on = table.made_on.model_copy(update={"device": "Old GPU", "runtime": "eager"})
    measured = table.model_copy(update={"made_on": made_on})
    warnings = check_table(measured, "t.json", other_space, SIZE, 5, "New GPU")
    assert warnings == (
        "t.json: measured on Old GPU, this is New GPU",
        "t.json: built with other space options: temperature",
    )
