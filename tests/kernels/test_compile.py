"""Every kernel compiles for the GPUs it must run on, with no GPU at hand, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SHARED = {75: 48 * 1024, 80: 80 * 1024, 90: 112 * 1024}
"""Bytes a block: without an opt-in, and for two blocks a multiprocessor."""
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "storage"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
def test_kernels_compile_without_spills(arch: int, storage: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(arch), storage]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    assert [row for row in rows if row["stack"] > 0 or row["shared"] > MOST_SHARED[arch]] == []
