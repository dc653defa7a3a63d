"""The stack that `make` installs, chosen through a fake nvidia-smi."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "choose_stack.py"


@pytest.fixture(scope="module")
def choose_stack():
    spec = importlib.util.spec_from_file_location("choose_stack", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(folder: Path, nvidia_smi: str | None) -> str:
    if nvidia_smi is not None:
        fake = folder / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        fake.chmod(0o755)
    answer = subprocess.run(
        [sys.executable, "-I", str(SCRIPT)],
        env={**os.environ, "PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.strip()


@pytest.mark.skipif(os.name == "nt", reason="the fake nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("nvidia_smi", "expected"),
    [
        (None, "torch==2.13.0 triton==3.7.1"),
        ("exit 9", "torch==2.13.0 triton==3.7.1"),
        ("echo 'No devices were found'", "torch==2.13.0 triton==3.7.1"),
        ("echo '6.1, 535.183.01'", "torch==2.7.1 cupy-cuda12x>=14,<15"),
        ("echo '7.0, 580.65.06'", "torch==2.8.0 cupy-cuda12x>=14,<15"),
        ("echo '9.0, 580.65.06'", "torch==2.13.0 triton==3.7.1 cupy-cuda13x>=14,<15"),
        ("echo '8.6, 550.54.14'", "torch==2.8.0 cupy-cuda12x>=14,<15"),
        ("echo '9.0, 580.1'; echo '6.1, 580.1'", "torch==2.7.1 cupy-cuda12x>=14,<15"),
    ],
)
def test_requirements_printed(tmp_path, nvidia_smi, expected):
    assert run_script(tmp_path, nvidia_smi) == expected


def test_capabilities_are_compared_as_numbers(choose_stack):
    assert choose_stack.parse_gpus("12.0, 580.65.06\n") == [((12, 0), 580)]
    assert choose_stack.requirements(choose_stack.parse_gpus("10.0, 580.1")) == choose_stack.CUDA_13


@pytest.mark.parametrize("answer", ["", "[N/A], 580.1", "garbage", "8.6"])
def test_answers_without_a_capability_count_as_no_gpu(choose_stack, answer):
    assert choose_stack.parse_gpus(answer) == []
