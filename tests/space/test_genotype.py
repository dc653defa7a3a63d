import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lgcnet_fast.errors import GenotypeError
from lgcnet_fast.nn.operations import CELL_OPS
from lgcnet_fast.space.genotype import (
    MAX_BYTES,
    load_genotype,
    named_genotypes,
    parse_genotype,
    save_genotype,
)
from lgcnet_fast.space.registry import make_space


def _reference():
    return load_genotype("reference").model_dump(mode="json")


def _parse(values):
    return parse_genotype(json.dumps(values).encode(), "file.json")


def _set(values, path, value):
    """Replaces, or with `...` deletes, the entry at a path."""
    *parents, last = path
    for key in parents:
        values = values[key]
    if value is ...:
        del values[last]
    else:
        values[last] = value


def test_the_shipped_reference():
    assert named_genotypes() == ("reference",)
    genotype = load_genotype("reference")
    assert genotype.space == "lgcnet" and genotype.taps == (0, 7, 13)
    assert genotype.cells[0] == ("skip", "sep3", "conv3", "none", "max3")
    assert genotype.fusion.ops["E10"] == "gp1"


@pytest.mark.parametrize(
    "options",
    [{}, {"name": "gas"}, {"head": "mscell"}, {"fusion": "grid13"}, {"stem_strides": [2, 1, 2]}],
    ids=str,
)
def test_saved_and_loaded(tmp_path, options):
    import torch

    genotype = make_space(options).random_genotype(torch.Generator().manual_seed(1))
    save_genotype(genotype, tmp_path / "g.json")
    assert load_genotype(tmp_path / "g.json") == genotype
    assert [path.name for path in tmp_path.iterdir()] == ["g.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "g.json"
    save_genotype(load_genotype("reference"), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_genotype(load_genotype("reference"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["g.json"]


def test_genotypes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_genotype("reference").taps = (0, 1, 2)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("cells", 3, 2), "sep5", r"cells\.3\.2: unknown operation, did you mean 'sep3'\?"),
        (("cells", 3, 2), 7, r"cells\.3\.2: .*string"),
        (("cells", 3), ["skip"] * 4, r"cells\.3: a cell has 5 edges, given 4"),
        (("cells", 3), ["skip"] * 6, r"cells\.3: a cell has 5 edges, given 6"),
        (("cells", 3), None, r"cells\.3: "),
        (("cells",), [], "cells: .*at least 1"),
        (("cells",), ..., "cells: Field required"),
        (("version",), 2, "version: .*1"),
        (("version",), ..., "version: missing"),
        (("space",), "lgcnett", "space: unknown search space 'lgcnett'; did you mean 'lgcnet'"),
        (("space",), None, "space: unknown search space"),
        (("space",), ["os:system"], "space: unknown search space"),
        (("tap",), [0], "unknown key 'tap'; did you mean 'taps'"),
        (("taps",), [0, 7, 14], "taps .* within the cells 0 to 13"),
        (("taps",), [0, 7], "head 'dcfc' reads 3 taps"),
        (("taps",), [7, 0, 13], "taps .* ascending"),
        (("taps",), [0, 8, 13], r"strides \[4, 16, 16\]"),
        (("taps",), [-1, 7, 13], r"taps\.0: .*greater than or equal to 0"),
        (("taps",), [0, 7.5, 13], r"taps\.1: .*integer"),
        (("reductions",), [1, 14], "reductions .* within the cells 1 to 13"),
        (("reductions",), [8, 1], "reductions .* ascending"),
        (("reductions",), [0, 8], "reductions .* within the cells 1"),
        (("widths",), [32, 64], "widths .* one entry more than reductions"),
        (("widths",), [32, 64, 0], r"widths\.2"),
        (("widths",), [32, 64, 10**9], r"widths\.2"),
        (("head",), "aspp", "head 'aspp' reads 1 tap,"),
        (("head",), "dcf", "head: "),
        (("fusion",), None, "head 'dcfc' needs 'topdown13' or 'grid13', given fusion None"),
        (("fusion", "variant"), "topdown12", "fusion.variant: "),
        (("fusion", "variant"), "grid13", "fusion: ops.E6: 'interp': unknown operation"),
        (("fusion", "ops", "E8"), "sep5", "fusion: ops.E8: 'sep5': .* did you mean 'sep3'"),
        (("fusion", "ops", "E4"), "conv1", "fusion: ops.E4: 'conv1': .* deconv, interp"),
        (("fusion", "ops", "E8"), ..., "fusion: ops lacks edge 'E8'"),
        (("fusion", "ops", "E14"), "conv1", "fusion: ops has no edge 'E14'"),
        (("stem", "strides"), [2, 2, 2], "stem: two of the stem's three strides must be 2"),
    ],
)
def test_mistakes_are_named(path, value, message):
    values = _reference()
    _set(values, path, value)
    with pytest.raises(GenotypeError, match=f"file.json: .*{message}"):
        _parse(values)


def test_a_cut_off_tap_is_refused():
    values = _reference()
    values["cells"][0] = ["none"] * 5
    with pytest.raises(GenotypeError, match="cell 0, a tap, is cut off from the stem"):
        _parse(values)


def test_a_fixed_head_has_no_fusion_cell():
    values = _reference() | {"head": "aspp", "taps": [13]}
    with pytest.raises(
        GenotypeError, match="head 'aspp' needs no fusion, given fusion 'topdown13'"
    ):
        _parse(values)
    assert _parse(values | {"fusion": None}).layout.output_stride == 16


def test_cells_behind_the_last_tap_are_not_built():
    values = _reference() | {"taps": [0, 7, 10]}
    space = make_space({"taps": [0, 7, 10]})
    assert len(space.build(_parse(values), 2).backbone.cells) == 11
    assert len(space.one_hot(_parse(values))["cells"]) == 55


@pytest.mark.parametrize(
    "options, key",
    [
        ({"cells": 12, "taps": [0, 7, 11]}, "taps"),
        ({"reductions": [1, 7], "taps": [0, 6, 13]}, "reductions"),
        ({"widths": [16, 32, 64]}, "widths"),
        ({"fusion": "grid13"}, "fusion.variant"),
        ({"head": "ppm"}, "head"),
        ({"stem_strides": [2, 1, 2]}, "stem"),
        ({"name": "gas"}, "space 'lgcnet' does not belong to space 'gas'"),
    ],
    ids=str,
)
def test_one_hot_of_a_foreign_genotype(options, key):
    with pytest.raises(GenotypeError, match=key):
        make_space(options).one_hot(load_genotype("reference"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 50_000, "not valid JSON"),
        (b"9" * 10_000, "not valid JSON"),
        (b"[]", "must be a JSON object, is a list"),
        (b"null", "must be a JSON object"),
        (b"{}", "space: unknown search space"),
        (b" " * (MAX_BYTES + 1), "not a genotype"),
    ],
)
def test_garbage(tmp_path, content, message):
    path = tmp_path / "g.json"
    path.write_bytes(content)
    with pytest.raises(GenotypeError, match=message) as caught:
        load_genotype(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_missing_files_and_folders(tmp_path):
    for name in (tmp_path, tmp_path / "none.json", "a\0b"):
        with pytest.raises(GenotypeError, match="cannot read the genotype"):
            load_genotype(name)
    with pytest.raises(GenotypeError, match="did you mean 'reference'"):
        load_genotype("referense")


def test_nothing_is_imported_for_a_file(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GenotypeError, match="unknown search space 'evil:Space'"):
        _parse(_reference() | {"space": "evil:Space"})


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes(content):
    with pytest.raises(GenotypeError):
        parse_genotype(content, "file.json")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(CELL_OPS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)  # fmt: skip
_PLACES = [
    ("cells",), ("cells", 0), ("cells", 5, 2), ("fusion",), ("fusion", "ops"),
    ("fusion", "ops", "E4"), ("fusion", "variant"), ("taps",), ("taps", 1), ("reductions",),
    ("widths",), ("widths", 0), ("head",), ("stem",), ("stem", "strides"), ("version",),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(_PLACES), value=_JSON)
def test_any_value_in_any_place(place, value):
    """Either a genotype that can be written again, or a message; nothing else."""
    values = _reference()
    _set(values, place, value)
    try:
        genotype = _parse(values)
    except GenotypeError as error:
        assert "file.json: " in str(error)
    else:
        assert _parse(genotype.model_dump(mode="json")) == genotype
