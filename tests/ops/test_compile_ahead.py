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
from lgcnet_fast.ops.compile_ahead import compile_ahead, compile_all, one_after_another
from lgcnet_fast.ops.compile_worker import CompilingDriver
from tests.ops.kernels_to_compile import copy, deadly, unfit

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
CompilingDriver.get_current_stream = lambda self, device: 0
driver.set_active(CompilingDriver(GPUTarget("cuda", 90, 32)))
x = torch.zeros(64)

def rehearsal():
    for kernel in KERNELS:
        for block in (16, 32, 64, 128):
            kernel.warmup(x, x, 64, BLOCK=block, grid=(1,))

def start(block):
    for kernel in KERNELS:
        kernel.warmup(x, x, 64, BLOCK=block, grid=(1,))

compile_ahead(rehearsal)
"""

ALL = """
ready = compile_all(start, ITEMS, lambda *counts: print(*counts, end="; "), ENOUGH)
print(ready)
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


def test_what_is_not_on_disk_is_compiled_by_others_once(tmp_path):
    assert rehearse(tmp_path).stdout == "compiling 3 kernels in 1 processes\n"
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 4 * ["copy.cubin"]
    assert rehearse(tmp_path).stdout == ""


def test_a_kernel_that_cannot_be_compiled_is_named_and_left_to_the_step(tmp_path):
    done = rehearse(tmp_path, "copy, unfit")
    assert "kernels left to their first launch: 4" in done.stdout
    assert "tests.ops.kernels_to_compile.unfit: " in done.stderr
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 4 * ["copy.cubin"]


def test_a_process_that_dies_leaves_its_kernels_to_the_step(tmp_path):
    done = rehearse(tmp_path, "copy, deadly")
    assert "kernels left to their first launch: " in done.stdout
    assert [path.name for path in tmp_path.rglob("*.cubin")].count("copy.cubin") >= 1


def test_a_rehearsal_that_fails_waits_for_nothing(tmp_path):
    last = """
try:
    compile_ahead(lambda: (rehearsal(), 1 / 0))
except ZeroDivisionError:
    print("told")
"""
    assert rehearse(tmp_path, last=last).stdout == "told\n"
    assert len(list(tmp_path.rglob("copy.cubin"))) < 4


def test_a_process_among_others_that_compile_leaves_it_to_its_launches(tmp_path):
    done = rehearse(tmp_path, last="with one_after_another():\n    compile_ahead(rehearsal)")
    assert done.stdout == "" and not list(tmp_path.rglob("*.cubin"))


def compile_items(cache, items, kernels="copy", enough="lambda ready: False"):
    last = ALL.strip().replace("ITEMS", items).replace("ENOUGH", enough)
    return rehearse(cache, kernels, last)


def test_equal_kernels_of_many_items_are_compiled_once(tmp_path):
    done = compile_items(tmp_path, "(16, 32, 16, 64)")
    assert done.stdout == "1 4; 2 4; 3 4; 4 4; 4\n"
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 3 * ["copy.cubin"]


def test_items_that_are_not_ready_when_it_is_enough_do_not_count(tmp_path):
    done = compile_items(tmp_path, "(16, 32, 64)", enough="lambda ready: ready >= 1")
    assert done.stdout.split("\n")[0].split("; ")[-1] in ("1", "2", "3")
    assert compile_items(tmp_path / "no", "(16,)", enough="lambda ready: True").stdout == "0\n"


def test_a_kernel_that_no_process_can_compile_is_told(tmp_path):
    done = compile_items(tmp_path, "(16,)", kernels="unfit")
    assert "kernels left to their first launch: 1" in done.stdout
    assert "tests.ops.kernels_to_compile.unfit: " in done.stderr
