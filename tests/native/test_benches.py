"""The measurements of the CUDA kernels run from end to end: tiny shapes, emulated kernels."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

# Triton reads this when it is first imported, which the twins of these kernels do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from bench.kernels import command  # noqa: E402
from lgcnet_fast.native.launcher import Launcher  # noqa: E402

FAMILIES = {
    "native_max_pool": ("max_pool",),
    "native_mixed_sum": ("mixed_sum", "mixed_sum_backward"),
    "native_separable": ("separable",),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_dry_run(
    name: str, emulated: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the measurement takes the GPU")
    for module in FAMILIES[name]:
        monkeypatch.setattr(f"lgcnet_fast.native.{module}.load", lambda: emulated)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--part", "dry", "--out", str(out)])
    command.main(importlib.import_module(f"bench.kernels.{name}").FAMILY)
    rows = json.loads(out.read_text())["rows"]
    assert rows and all(row["ours_us"] > 0 for row in rows if "case" in row)
