import sys
from pathlib import Path

import pytest
import torch

from lgcnet_fast.config import PRESETS, load_config
from lgcnet_fast.errors import ConfigError, TableError
from lgcnet_fast.space import registry
from lgcnet_fast.space.gas import GAS
from lgcnet_fast.space.genotype import load_genotype, save_genotype
from lgcnet_fast.space.lgcnet import LGCNet
from lgcnet_fast.space.registry import get_space, make_space, registered_spaces
from lgcnet_fast.space.sampling import gumbel_softmax


@pytest.fixture
def plug_in(monkeypatch):
    """Name of the toy space, registered for one test only."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setattr(registry, "_SPACES", dict(registered_spaces()))
    yield "toy_space:ToySpace"
    sys.modules.pop("toy_space", None)


def test_built_in_spaces():
    assert get_space("lgcnet") is LGCNet and get_space("gas") is GAS
    assert isinstance(make_space({}), LGCNet)


def test_defaults_are_the_papers():
    options = make_space({"name": "lgcnet"}).options
    assert (options.cells, options.reductions, options.widths) == (14, (1, 8), (32, 64, 128))
    assert options.resolved_taps == (0, 7, 13)
    assert (options.communication, options.gamma, options.gcn_width) == ("gcn", 0.5, 64)
    assert options.stem.widths == (8, 16, 32) and options.stem.strides == (2, 2, 1)


def test_gas_is_lgcnet_with_aspp():
    options = make_space({"name": "gas"}).options
    assert options.head == "aspp" and options.resolved_taps == (13,)
    genotype = make_space({"name": "gas"}).random_genotype(torch.Generator())
    assert genotype.space == "gas" and genotype.fusion is None


@pytest.mark.parametrize(
    "options, taps",
    [
        ({"cells": 4, "reductions": [1, 2]}, (0, 1, 3)),
        ({"head": "mscell"}, (7, 13)),
        ({"head": "none", "reductions": [], "widths": [8], "cells": 3}, (2,)),
    ],
    ids=str,
)
def test_default_taps(options, taps):
    assert make_space(options).options.resolved_taps == taps


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "lgcnett"}, "unknown search space 'lgcnett'; did you mean 'lgcnet'"),
        ({"name": 3}, "space.name: must be a string"),
        ({"cell": 4}, "unknown key 'space.cell'; did you mean 'cells'"),
        ({"gama": 0.5}, "unknown key 'space.gama'; did you mean 'gamma'"),
        ({"cells": 0}, "space.cells: .*greater than or equal to 1"),
        ({"cells": "14"}, "space.cells: .*integer"),
        ({"cells": 8}, "reductions .* within the cells 1 to 7"),
        ({"reductions": [8, 1]}, "ascending"),
        ({"reductions": [1]}, "widths .* one entry more"),
        ({"widths": [32, 64, -1]}, r"space.widths.2"),
        ({"head": "psp"}, "space.head: "),
        ({"head": "aspp", "taps": [0, 7, 13]}, "head 'aspp' reads 1 tap, given"),
        ({"head": "dcfc", "taps": [13]}, "head 'dcfc' reads 3 taps"),
        ({"taps": [1, 7, 13]}, r"strides \[8, 8, 16\]"),
        ({"taps": [0, 7, 14]}, "within the cells 0 to 13"),
        ({"reductions": [1], "widths": [8, 16]}, "head 'dcfc' reads 3 taps, given"),
        ({"fusion": "mscell"}, "space.fusion: "),
        ({"communication": "gnn"}, "space.communication: "),
        ({"gcn_width": 0}, "space.gcn_width"),
        ({"gamma": float("nan")}, "space.gamma"),
        ({"n_fc": 3}, "space.n_fc"),
        ({"search_width_mult": 0}, "space.search_width_mult"),
        ({"search_width_mult": 0.3}, "does not give whole channels"),
        ({"stem_strides": [2, 2, 2]}, "two of the stem's three strides must be 2"),
        ({"stem_widths": [8, 16]}, "space.stem_widths"),
    ],
    ids=str,
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make_space(options)


def test_a_plug_in_by_its_class(plug_in, tmp_path):
    """The whole life of another paper's space through the interface alone."""
    space = make_space({"name": plug_in, "width": 6})
    arch = space.build_arch()
    z = gumbel_softmax(arch(), 0.5, torch.Generator().manual_seed(0), space.arch_groups())
    assert z["depth"][1, 2] == 0
    supernet = space.build_supernet(3)
    keys = space.lut_keys((16, 16), 3)
    model = space.latency_model({key: 1.0 for key in keys}, (16, 16), 3)
    loss = supernet(torch.randn(2, 3, 16, 16), z).square().mean() + model(z).total
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in arch.parameters())

    genotype, _ = space.discretise(arch())
    save_genotype(genotype, tmp_path / "toy.json")
    assert load_genotype(tmp_path / "toy.json") == genotype
    steps = sum(len(names) for names in genotype.stages)
    assert model(space.one_hot(genotype)).searchable == steps
    x = torch.randn(1, 3, 16, 16)
    assert space.build(genotype, 3)(x).shape == (1, 3, 4, 4)
    assert space.build_classifier(genotype, 5)(x).shape == (1, 5)
    with pytest.raises(TableError):
        space.latency_model({}, (16, 16), 3)


def test_options_of_a_plug_in_are_validated(plug_in):
    with pytest.raises(ConfigError, match="unknown key 'space.widt'; did you mean 'width'"):
        make_space({"name": plug_in, "widt": 6})


def test_bad_plug_ins(plug_in, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plug_ins.py").write_text(
        "from lgcnet_fast.space.base import SearchSpace\n"
        "from lgcnet_fast.space.lgcnet import LGCNet\n"
        "class Half(SearchSpace):\n    name = 'half'\n"
        "class Copy(LGCNet):\n    pass\n"
        "number = 3\n"
    )
    (tmp_path / "broken_plug_in.py").write_text("1 / 0\n")
    for name, message in {
        "no_such_module:Space": "cannot import 'no_such_module'",
        "broken_plug_in:Space": "cannot import 'broken_plug_in': division by zero",
        ":Space": "cannot import ''",
        "plug_ins:": "not a class derived from SearchSpace",
        "plug_ins:Missing": "not a class derived from SearchSpace",
        "plug_ins:number": "not a class derived from SearchSpace",
        "plug_ins:Half": "does not implement arch_groups, build,",
        "plug_ins:Copy": "calls itself 'lgcnet', a name that another",
    }.items():
        with pytest.raises(ConfigError, match=message):
            get_space(name)
    sys.modules.pop("plug_ins", None)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_describe_valid_spaces(preset):
    make_space(load_config(preset=preset).space)
