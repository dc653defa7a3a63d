"""The torch stack that `make` installs, chosen through a fake nvidia-smi."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lgcnet_fast import stack

SCRIPT = Path(__file__).parents[1] / "tools" / "choose_stack.py"


def run_script(folder: Path, nvidia_smi: str | None) -> subprocess.CompletedProcess[str]:
    if nvidia_smi is not None:
        fake = folder / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        fake.chmod(0o755)
    return subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT)],  # -S: nothing that pip installed
        env={**os.environ, "PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="the fake nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("nvidia_smi", "expected"),
    [
        (None, "torch==2.13.0 triton==3.7.1"),
        ("exit 9", "torch==2.13.0 triton==3.7.1"),
        ("echo '6.1, 535.183.01, NVIDIA TITAN Xp'", "torch==2.7.1 cupy-cuda12x>=14,<15"),
        ("echo '7.0, 580.65.06, Tesla V100'", "torch==2.8.0 cupy-cuda12x>=14,<15"),
        ("echo '9.0, 580.65.06, H200'", "torch==2.13.0 triton==3.7.1 cupy-cuda13x>=14,<15"),
        ("echo '8.6, 550.54.14, A4000'", "torch==2.8.0 cupy-cuda12x>=14,<15"),
        ("echo '9.0, 580.1, a'; echo '6.1, 580.1, b'", "torch==2.7.1 cupy-cuda12x>=14,<15"),
    ],
)
def test_requirements_printed(tmp_path, nvidia_smi, expected):
    assert run_script(tmp_path, nvidia_smi).stdout.strip() == expected


@pytest.mark.skipif(os.name == "nt", reason="the fake nvidia-smi is a shell script")
def test_a_failing_nvidia_smi_is_reported(tmp_path):
    done = run_script(tmp_path, "echo 'Driver/library version mismatch'; exit 18")
    assert "Driver/library version mismatch" in done.stderr
    assert done.stdout.strip() == "torch==2.13.0 triton==3.7.1"


def test_capabilities_are_compared_as_numbers():
    gpus = stack.parse_gpus("12.0, 580.65.06, RTX 5090\n")
    assert gpus == (((12, 0), 580, "RTX 5090"),)
    assert stack.requirements(gpus) == stack.CUDA_13
    assert stack.stack_for((10, 0)) == stack.CUDA_13


@pytest.mark.parametrize("answer", ["", "[N/A], 580.1, x", "garbage", "8.6", "8.6, 580.1"])
def test_other_answers_list_no_gpu(answer):
    assert stack.parse_gpus(answer) == ()
