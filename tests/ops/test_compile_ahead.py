"""Kernels compiled ahead by other processes, for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton.knobs")

SERVER = """
import json, logging, os, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from lgcnet_fast.ops.compile_ahead import compile_ahead, compile_all, one_after_another
from lgcnet_fast.ops.compile_worker import CompilingDriver
from tests.ops.kernels_to_compile import copy, deadly, negate, unfit

CompilingDriver.get_current_stream = lambda self, device: 0
driver.set_active(CompilingDriver(GPUTarget("cuda", 90, 32)))
for line in sys.stdin:
    script, cache, *outputs = json.loads(line)
    process = os.fork()
    if process == 0:
        for number, output in enumerate(outputs, 1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
        os.environ["TRITON_CACHE_DIR"] = cache
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
        exec(script)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""Runs each script in a process that need not import torch again."""

SCRIPT = """
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
from lgcnet_fast.ops import compile_ahead as module
module.cores = lambda: CORES
ready = compile_all(start, ITEMS, lambda *counts: print(*counts, end="; "), ENOUGH)
print(ready)
"""


class Done(NamedTuple):
    stdout: str
    stderr: str


class Rehearse:
    """What is printed where these kernels are compiled ahead."""

    def __init__(self, server: subprocess.Popen[str], outputs: Path) -> None:
        self._server, self._outputs = server, [outputs / "stdout", outputs / "stderr"]

    def __call__(
        self, cache: Path, kernels: str = "copy", last: str = "compile_ahead(rehearsal)"
    ) -> Done:
        script = SCRIPT.replace("KERNELS", f"({kernels},)")
        script = script.replace("compile_ahead(rehearsal)", last)
        assert self._server.stdin is not None and self._server.stdout is not None
        for output in self._outputs:
            output.unlink(missing_ok=True)
        print(
            json.dumps([script, str(cache), *map(str, self._outputs)]),
            file=self._server.stdin,
            flush=True,
        )
        assert self._server.stdout.readline() == "0\n", self._outputs[1].read_text()
        return Done(*(output.read_text() for output in self._outputs))


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearse]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Rehearse(server, tmp_path_factory.mktemp("outputs"))


def test_what_is_not_on_disk_is_compiled_by_others_once(rehearse, tmp_path):
    assert rehearse(tmp_path).stdout == "compiling 3 kernels in 1 processes\n"
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 4 * ["copy.cubin"]
    assert rehearse(tmp_path).stdout == ""


def test_kernels_are_found_that_others_have_compiled_in_another_order(rehearse, tmp_path):
    """Both call the same function, which reads a constant."""
    assert rehearse(tmp_path, "copy, negate").stdout == "compiling 7 kernels in 2 processes\n"
    assert rehearse(tmp_path, "copy, negate").stdout == ""
    assert rehearse(tmp_path, "negate, copy").stdout == ""
    names = sorted(path.name for path in tmp_path.rglob("*.cubin"))
    assert names == 4 * ["copy.cubin"] + 4 * ["negate.cubin"]


def test_what_others_compile_is_for_launches_before_their_turn(rehearse, tmp_path):
    rehearse(tmp_path)
    about = [json.loads(path.read_text()) for path in tmp_path.rglob("copy.json")]
    assert [each["launch_pdl"] for each in about] == 4 * [True]
    for path in tmp_path.rglob("copy.ptx"):
        before, _, after = path.read_text().partition("griddepcontrol.wait")
        assert ".global." in after and "ld.global" not in before


def test_a_kernel_that_cannot_be_compiled_is_named_and_left_to_the_step(rehearse, tmp_path):
    done = rehearse(tmp_path, "copy, unfit")
    assert "kernels left to their first launch: 4" in done.stdout
    assert "tests.ops.kernels_to_compile.unfit: " in done.stderr
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 4 * ["copy.cubin"]


def test_a_process_that_dies_leaves_its_kernels_to_the_step(rehearse, tmp_path):
    done = rehearse(tmp_path, "copy, deadly")
    assert "kernels left to their first launch: " in done.stdout
    assert [path.name for path in tmp_path.rglob("*.cubin")].count("copy.cubin") >= 1


def test_a_rehearsal_that_fails_waits_for_nothing(rehearse, tmp_path):
    last = """
try:
    compile_ahead(lambda: (rehearsal(), 1 / 0))
except ZeroDivisionError:
    print("told")
"""
    assert rehearse(tmp_path, last=last).stdout == "told\n"
    assert len(list(tmp_path.rglob("copy.cubin"))) < 4


def test_a_process_among_others_that_compile_leaves_it_to_its_launches(rehearse, tmp_path):
    done = rehearse(tmp_path, last="with one_after_another():\n    compile_ahead(rehearsal)")
    assert done.stdout == "" and not list(tmp_path.rglob("*.cubin"))


def compile_items(
    rehearse, cache, items, kernels="copy", enough="lambda ready: False", processes=1
):
    last = ALL.strip().replace("ITEMS", items).replace("ENOUGH", enough)
    last = last.replace("CORES", str(processes))
    return rehearse(cache, kernels, last)


def test_equal_kernels_of_many_items_are_compiled_once(rehearse, tmp_path):
    done = compile_items(rehearse, tmp_path, "(16, 32, 16, 64)", processes=2)
    assert done.stdout == "1 4; 2 4; 3 4; 4 4; 4\n"
    assert [path.name for path in tmp_path.rglob("*.cubin")] == 3 * ["copy.cubin"]


def test_items_that_are_not_ready_when_it_is_enough_do_not_count(rehearse, tmp_path):
    done = compile_items(rehearse, tmp_path, "(16, 32, 64)", enough="lambda ready: ready >= 1")
    assert done.stdout.split("\n")[0].split("; ")[-1] in ("1", "2", "3")
    assert (
        compile_items(rehearse, tmp_path / "no", "(16,)", enough="lambda ready: True").stdout
        == "0\n"
    )


def test_a_kernel_that_no_process_can_compile_is_told(rehearse, tmp_path):
    done = compile_items(rehearse, tmp_path, "(16,)", kernels="unfit")
    assert "kernels left to their first launch: 1" in done.stdout
    assert "tests.ops.kernels_to_compile.unfit: " in done.stderr
