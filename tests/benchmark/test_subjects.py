"""Everything that a user may name, and the mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lgcnet_fast.benchmark.engines import unnamed_classes
from lgcnet_fast.benchmark.networks import random_network, settle_batch_norms
from lgcnet_fast.benchmark.subjects import import_network, open_subject, short_name
from lgcnet_fast.deploy.blueprint import Blueprint, save_blueprint
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.errors import ConfigError, EngineError, GenotypeError
from lgcnet_fast.ops import use_backend
from lgcnet_fast.space.genotype import load_genotype
from tests.benchmark import nets

NETS = "tests.benchmark.nets"


def test_modules_by_import_path():
    for name in ("tiny", "Tiny", "INSTANCE"):
        subject = open_subject(f"{NETS}:{name}")
        assert subject.kind == "module" and isinstance(subject.network, nets.Tiny)
        assert not subject.network.training and subject.blueprint is None
    assert subject.parameters == 3 * 5 * 9 + 5 + 10


def test_the_working_folder_is_a_place_to_import_from(tmp_path, monkeypatch):
    (tmp_path / "my_nets_here.py").write_text("from torch import nn\nmake = nn.Identity\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(import_network("my_nets_here:make"), nn.Identity)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_package.nets:tiny", "cannot import 'no_such_package.nets': ModuleNotFoundError"),
        (f"{NETS}:tinny", "has no 'tinny'"),
        (f"{NETS}:", "has no ''"),
        (f"{NETS}:failing", "it raised FileNotFoundError: weights.pth is not here"),
        (f"{NETS}:needs_arguments", "it raised TypeError: needs_arguments() missing 1"),
        (f"{NETS}:no_module", "gives a dict; a torch.nn.Module is needed"),
        (f"{NETS}:NUMBER", "gives a int; a torch.nn.Module is needed"),
        (":tiny", "cannot import ''"),
    ],
)
def test_wrong_import_paths_are_told(name, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as raised:
        open_subject(name)
    assert str(raised.value).startswith(name) and "\n" not in str(raised.value)


def test_a_module_that_fails_at_import_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken_nets_here.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="ZeroDivisionError: division by zero"):
        open_subject("broken_nets_here:net")


def test_genotypes_by_name_and_file(tmp_path):
    subject = open_subject("reference", num_classes=7)
    assert subject.kind == "genotype" and len(subject.blueprint.classes) == 7
    assert subject.parameters == pytest.approx(2.09e6, rel=0.02)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(GenotypeError, match="bad.json"):
        open_subject(str(tmp_path / "bad.json"))


def test_engine_files(tmp_path):
    genotype = load_genotype("reference")
    network = random_network(genotype, 3)
    path = tmp_path / "street.engine"
    save_blueprint(Blueprint(genotype, unnamed_classes(3), (65, 129), fold(network)), path)
    subject = open_subject(str(path))
    assert (subject.kind, subject.size) == ("engine", (65, 129))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EngineError, match="street.engine"):
        open_subject(str(path))


def test_what_is_nothing_is_told_with_what_there_is(tmp_path):
    with pytest.raises(ConfigError, match="no such run folder, engine or ONNX.*'reference'"):
        open_subject("refrence")
    with pytest.raises(ConfigError, match="gone.onnx: no such file"):
        open_subject(str(tmp_path / "gone.onnx"))


def test_random_networks_are_the_same_every_time():
    genotype = load_genotype("reference")
    state = torch.get_rng_state()
    one, other = (random_network(genotype, 4).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(state, torch.get_rng_state())


def test_settled_networks_keep_their_scale():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(layer for _ in range(12) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()))
    ).eval()
    x = torch.randn(1, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = network(x).std()
        settle_batch_norms(network)
        after = network(x).std()
    assert 0.2 < after < 2 and before < after / 2
    assert all(not module.training for module in network.modules())
    assert all(m.momentum == 0.1 for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_batch_norms_settle_whatever_backend_is_set():
    network = random_network(load_genotype("reference"), 4)
    with use_backend("cuda", strict=True):  # which serves no tensor of the CPU
        settle_batch_norms(network)


def test_names_tell_nothing_about_folders():
    assert short_name(Path("/home/someone/runs/camvid")) == "runs/camvid"
    assert short_name("/camvid.onnx") == "camvid.onnx"
    assert short_name("reference") == "reference"
