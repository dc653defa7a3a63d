"""Finding a route to the kernels, and saying why there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native import build_record, instances, loader, prebuilt, sources
from lgcnet_fast.native.launcher import check_grid
from lgcnet_fast.native.prebuilt import Prebuilt, runs_on
from lgcnet_fast.native.run_time import RunTime


@pytest.fixture(autouse=True)
def fresh_attempts() -> None:
    loader.attempt.cache_clear()


def test_without_a_gpu_every_route_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = loader.available()
    assert set(reasons) == {Prebuilt.route, RunTime.route}
    assert all(reason and "no CUDA GPU" in reason for reason in reasons.values())


def test_the_error_shows_both_causes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "lgcnet_fast.native._kernels", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    record = tmp_path / "build_record.json"
    record.write_text(json.dumps({"built": "no", "reason": "no nvcc on the path"}))
    monkeypatch.setattr(build_record, "PATH", record)
    with pytest.raises(DeviceError) as raised:
        loader.load()
    assert "no nvcc on the path" in str(raised.value)
    assert "pip install 'cupy-cuda12x" in str(raised.value)


class OtherSources:
    sources = "0123456789abcdef"
    architectures = "75+PTX"


def test_an_extension_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "_import_extension", OtherSources)
    with pytest.raises(DeviceError, match="install the package again"):
        Prebuilt()


@pytest.mark.parametrize(
    ("architectures", "capability", "answer"),
    [
        ("90+PTX", (9, 0), True),
        ("75;80+PTX", (8, 6), True),
        ("75;80+PTX", (9, 0), True),
        ("75;90+PTX", (8, 0), False),
        ("90+PTX", (7, 5), False),
        ("60;75+PTX", (6, 1), True),
        ("61;75+PTX", (6, 0), False),
        ("100;120+PTX", (12, 0), True),
    ],
)
def test_where_an_extension_runs(
    architectures: str, capability: tuple[int, int], answer: bool
) -> None:
    assert runs_on(architectures, capability) is answer


def test_the_digest_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = sources.digest()
    for path in sources.FOLDER.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    assert sources.digest() == before
    with (tmp_path / "numeric.cuh").open("a") as file:
        file.write("//\n")
    assert sources.digest() != before


def test_no_kernel_is_listed_twice() -> None:
    names = [instance.expression for instance in instances.all_instances()]
    assert len(names) == len(set(names)) > 50


def test_the_extension_holds_every_kernel() -> None:
    extension = pytest.importorskip("lgcnet_fast.native._kernels")
    if extension.sources != sources.digest():
        pytest.skip("the extension is older than the sources")
    assert sorted(extension.names()) == sorted(one.expression for one in instances.all_instances())
    with pytest.raises(ValueError, match="bytes of arguments"):
        extension.launch(0, (1, 1, 1), (1, 1, 1), b"", 0, 0, False)
    with pytest.raises(IndexError):
        extension.launch(-1, (1, 1, 1), (1, 1, 1), b"", 0, 0, False)


def test_a_grid_past_what_cuda_can_number_is_refused() -> None:
    with pytest.raises(ValueError, match="65536"):
        check_grid("some_kernel", (1, 65536, 1))


@pytest.mark.gpu
def test_a_route_works_here() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    assert None in loader.available().values()
    assert loader.load() is loader.load()
