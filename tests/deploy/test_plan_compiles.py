"""The plan of the reference network compiles for the GPUs it must run on, with no GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("arch", "dtype", "most_stack", "most_shared"),
    # Without matrix units the products of a node spill a little. Compute capability 8.6 has 99 KiB.
    [(75, "fp16", 256, 48), (80, "bf16", 32, 99), (90, "fp16", 32, 99), (90, "fp32", 256, 48)],
)
def test_every_launch_compiles(arch: int, dtype: str, most_stack: int, most_shared: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.deploy.compile_plan", str(arch), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 40
    assert [r for r in rows if r["stack"] > most_stack or r["shared"] > most_shared * 1024] == []
