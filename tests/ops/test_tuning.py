"""Tuning tables: what is written is read, and what is wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops import tuning
from lgcnet_fast.ops.tuning import TuningTable, read_table, shape_key, table_path, write_table

GPU = torch.device("cuda:0")
KEY = shape_key(torch.bfloat16, (16, 48, 32, 64), (128, 256))
TABLE = TuningTable(
    device="NVIDIA H200",
    measured={"torch": "2.11.0", "command": tuning.REMEDY},
    backends={"upsample": "triton", "upsample_argmax": "reference"},
    configs={"upsample": {KEY: {"rows": 8}}},
)


@dataclass(frozen=True)
class Launch:
    block: int = 1024
    rows: int = 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables are looked for in an empty folder, and the GPU is an H200."""
    monkeypatch.setattr(
        tuning, "table_path", lambda name, folder=tmp_path: table_path(name, folder)
    )
    monkeypatch.setattr(tuning, "_device_name", lambda device: "NVIDIA H200")
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_what_is_written_is_read(folder: Path) -> None:
    path = write_table(TABLE, folder)
    assert path.name == "nvidia_h200.json"
    assert read_table(path) == TABLE
    assert list(folder.iterdir()) == [path]


def test_a_new_table_is_used_at_once(folder: Path) -> None:
    assert tuning.backend_for("upsample", GPU)[0] == "reference"
    write_table(TABLE, folder)
    assert tuning.backend_for("upsample", GPU) == ("triton", None)


def test_what_is_not_measured_has_a_reason(folder: Path) -> None:
    backend, reason = tuning.backend_for("upsample", GPU)
    assert backend == "reference" and reason is not None
    assert "no tuning table for NVIDIA H200" in reason and "python -m bench.tune" in reason
    write_table(TABLE, folder)
    assert tuning.backend_for("upsample_argmax", GPU) == ("reference", None)
    backend, reason = tuning.backend_for("mixed_sum", GPU)
    assert backend == "reference" and reason is not None and "mixed_sum is not in" in reason


def test_launch_configurations_lie_over_the_defaults(folder: Path) -> None:
    assert tuning.tuned(Launch(), "upsample", KEY, GPU) == Launch()
    write_table(TABLE, folder)
    assert tuning.tuned(Launch(), "upsample", KEY, GPU) == Launch(rows=8)
    assert tuning.tuned(Launch(), "upsample", "another", GPU) == Launch()
    assert tuning.tuned(Launch(), "another", KEY, GPU) == Launch()
    assert tuning.tuned(Launch(), "upsample", KEY, torch.device("cpu")) == Launch()


def test_a_field_that_the_launcher_lacks_is_named(folder: Path) -> None:
    configs = {"upsample": {KEY: {"rows": 8, "stages": 3}}}
    path = write_table(TABLE.model_copy(update={"configs": configs}), folder)
    with pytest.raises(BackendError, match="the launcher has no stages") as caught:
        tuning.tuned(Launch(), "upsample", KEY, GPU)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": 2}, "format"),
        ({"backends": {"upsample": "cublas"}}, "backends.upsample: Input should be 'triton'"),
        ({"backend": {}}, "unknown key 'backend'; did you mean 'backends'"),
        ({"configs": {"upsample": {KEY: {"rows": 0}}}}, f"configs.upsample.{KEY}.rows"),
        ({"configs": {"upsample": {KEY: {"rows": "4"}}}}, f"configs.upsample.{KEY}.rows"),
        ({"device": ""}, "device"),
    ],
)
def test_faults_are_named(folder: Path, change: dict, fault: str) -> None:
    path = folder / "nvidia_h200.json"
    path.write_text(json.dumps(TABLE.model_dump() | change))
    with pytest.raises(BackendError) as caught:
        tuning.backend_for("upsample", GPU)
    message = str(caught.value)
    assert str(path) in message and fault in message and "python -m bench.tune" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_damaged_files_are_refused(folder: Path, text: str) -> None:
    path = folder / "nvidia_h200.json"
    path.write_text(text)
    with pytest.raises(BackendError, match="nvidia_h200.json"):
        read_table(path)
    with pytest.raises(BackendError, match="cannot read"):
        read_table(folder / "none.json")


def test_file_names_of_devices() -> None:
    assert table_path("NVIDIA GeForce RTX 2080 Ti").name == "nvidia_geforce_rtx_2080_ti.json"
    assert table_path("NVIDIA H100 80GB HBM3/../x").name == "nvidia_h100_80gb_hbm3_x.json"


def test_committed_tables_are_valid() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        assert table_path(read_table(path).device) == path
