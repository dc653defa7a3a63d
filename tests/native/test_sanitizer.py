"""What compute-sanitizer is to watch, kernels emulated, and how its log is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import sanitize
from bench.sanitize import judge, read_log
from bench.sanitizer_launches import Recording, launch_all, summary
from lgcnet_fast.native.instances import all_instances
from lgcnet_fast.native.launcher import Launcher


def test_every_kernel_is_launched(emulated: Launcher) -> None:
    launcher = Recording(emulated)
    launch_all(launcher)
    found = summary(launcher)
    portable = [one for one in all_instances() if not one.hopper]
    assert found["instances"] == len(portable)
    assert set(found["kernels"]) == {one.kernel for one in portable}


LOG = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void lgcnet::upsample_forward<float, (int)4>(lgcnet::Arguments)+0x70
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at void lgcnet::upsample_forward<float, (int)4>(lgcnet::Arguments)+0x90
=========     by thread (4,0,0) in block (0,0,0)
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<float>(float*)+0x10
=========
========= Error: Race reported between Write access at void lgcnet::separable<float>()+0x1
=========     and Read access at void lgcnet::separable<float>()+0x9 [16 hazards]
=========
========= Target application returned an error
========= ERROR SUMMARY: 5 errors
"""


def test_the_log_is_read() -> None:
    found = read_log(LOG)
    assert found.finished and found.elsewhere == 1
    invalid, race, ended = sorted(found.ours, key=lambda message: -found.ours[message])
    assert invalid.endswith("at void lgcnet::upsample_forward<float, (int)4>(lgcnet::Arguments)")
    assert found.ours[invalid] == 2
    assert race.startswith("Error: Race") and ended == "Target application returned an error"


def test_a_clean_log_and_one_that_ends_early() -> None:
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert read_log(clean) == ({}, 0, True)
    assert read_log("========= COMPUTE-SANITIZER\n") == ({}, 0, False)


def test_a_sanitizer_that_finds_nothing_planted_is_not_trusted() -> None:
    row = {"findings": {}, "failure": "", "planted_found": 0}
    assert judge("memcheck", row) == ["a planted fault (out_of_bounds) was not found"]
    assert judge("memcheck", {**row, "planted_found": 3}) == []


def test_a_missing_sanitizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(sys, "argv", ["sanitize", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="compute-sanitizer is missing"):
        sanitize.main()
