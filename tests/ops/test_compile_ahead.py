"""Kernels compiled ahead by other processes, for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.knobs")

SCRIPT = """
import logging, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from lgcnet_fast.ops.compile_ahead import compile_ahead, one_after_another
from lgcnet_fast.ops.compile_worker import CompilingDriver
from tests.ops.kernels_to_compile import copy, unfit

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
CompilingDriver.get_current_stream = lambda self, device: 0
driver.set_active(CompilingDriver(GPUTarget("cuda", 90, 32)))
x = torch.zeros(64)

def rehearsal():
    for kernel in KERNELS:
        for block in (16, 32, 64, 128):
            kernel.warmup(x, x, 64, BLOCK=block, grid=(1,))

compile_ahead(rehearsal)
"""


def rehearse(cache, kernels="copy", last="compile_ahead(rehearsal)"):
    """What is printed where these kernels are compiled ahead."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    script = SCRIPT.replace("KERNELS", f"({kernels},)").replace("compile_ahead(rehearsal)", last)
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


def test_what_is_not_on_disk_is_compiled_by_others(tmp_path):
    assert rehearse(tmp_path).stdout == "compiling 3 kernels in 1 processes\n"
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 4 * ["copy.cubin"]


def test_what_is_on_disk_is_not_compiled_again(tmp_path):
    rehearse(tmp_path)
    assert rehearse(tmp_path).stdout == ""


def test_a_kernel_that_cannot_be_compiled_is_named_and_left_to_the_step(tmp_path):
    done = rehearse(tmp_path, "copy, unfit")
    assert "2 of 2 processes that compile kernels ahead failed" in done.stdout
    assert "tests.ops.kernels_to_compile.unfit: " in done.stderr
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 4 * ["copy.cubin"]


def test_a_process_among_others_that_compile_leaves_it_to_its_launches(tmp_path):
    done = rehearse(tmp_path, last="with one_after_another():\n    compile_ahead(rehearsal)")
    assert done.stdout == "" and not list(tmp_path.rglob("*.cubin"))
