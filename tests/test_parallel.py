"""Work in processes of their own."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from lgcnet_fast import parallel
from lgcnet_fast.errors import ConfigError, DeviceError


def note(folder: str, item: str) -> None:
    if item == "bad":
        raise ConfigError("bad item")
    if item == "deadly":
        os._exit(1)
    (Path(folder) / item).write_text(str(os.getpid()))


def test_all_items_are_done_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    told = []
    parallel.in_processes(
        partial(note, str(tmp_path)), ["a", "b", "c"], lambda *counts: told.append(counts)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    processes = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3 and os.getpid() not in processes


def test_errors_come_back(tmp_path):
    with pytest.raises(ConfigError, match="bad item"):
        parallel.in_processes(partial(note, str(tmp_path)), ["bad"])
    with pytest.raises(DeviceError, match="a process that compiled kernels died"):
        parallel.in_processes(partial(note, str(tmp_path)), ["deadly"])
