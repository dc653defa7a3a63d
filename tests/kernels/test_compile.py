"""Every kernel compiles for the GPUs it must run on, with no GPU at hand, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.carried_bounds import carried_bounds
from tests.kernels.registers_in_flight import overwritten

MOST_SHARED = {75: 48 * 1024, 80: 80 * 1024, 90: 112 * 1024}
"""Bytes a block: without an opt-in, and for two blocks a multiprocessor."""
ALONE = {"_product_sum_kernel", "_input_gradients_kernel", "_conv3_kernel", "_strided_kernel"}
"""Of wide maps, one block to a multiprocessor of an H200, which has 227 KB."""
OF_ENGINES = {"_argmax_kernel"}
"""Launched in order everywhere, see kernels/launches.py."""
HANDING_OVER = {"_slab_statistics_kernel", "_gradient_sums_kernel"}
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "storage"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
def test_kernels_compile_without_spills(arch: int, storage: str) -> None:
    rows = compiled("-m", "tests.kernels.compile_kernels", str(arch), storage)
    assert [row for row in rows if row["stack"] > 0 or row["shared"] > most_shared(arch, row)] == []
    assert [row for row in rows if row["atomics"] != row["handovers"]] == []
    assert [row for row in rows if row["overwritten"]] == []
    assert {row["kernel"] for row in rows if row["handovers"]} == HANDING_OVER


def most_shared(arch: int, row: dict[str, Any]) -> int:
    alone = arch == 90 and row["kernel"] in ALONE
    return 227 * 1024 if alone else MOST_SHARED[arch]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "kernels"), [(80, "float32", 28), (90, "float32", 28), (90, "bfloat16", 15)]
)
def test_smallest_maps_compile(arch: int, dtype: str, kernels: int) -> None:
    rows = compiled("-m", "tests.kernels.compile_launches", str(arch), dtype)
    assert len(rows) >= kernels
    assert [row for row in rows if row["carried_bounds"]] == []
    waits = [row for row in rows if row["order"] == ["waits"]]
    in_order = {row["kernel"] for row in rows if row["order"] == ["after"]}
    assert len(waits) + len(in_order) == len(rows)
    assert not waits if arch < 90 else in_order == OF_ENGINES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_of_wide_maps_fit(dtype: str) -> None:
    rows = compiled("-m", "tests.kernels.compile_tiles", "90", dtype)
    assert len({row["kernel"] for row in rows}) == 4
    assert [row for row in rows if not row["shared"] <= row["most"] <= 227 * 1024] == []


@pytest.mark.slow
def test_nothing_of_float64_is_computed_in_float32() -> None:
    rows = compiled("-m", "tests.kernels.compile_launches", "90", "float64")
    assert len(rows) >= 15
    assert [row for row in rows if row["float32"]] == []


def compiled(*script: str) -> list[dict[str, Any]]:
    """The lines of a script that compiles kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    return rows


LOOPS = """
    %start_1 = scf.for %i = %first to %0 step %c1_i32 iter_args(%start_2 = %start_0) -> (i32)  : i32 {
      %end_3 = arith.muli %i, %scale : i32
      %next = arith.addi %BOUND, %c1_i32 : i32
      scf.for %row = %next to %end_3 step %c1_i32  : i32 {
      }
      scf.yield %end_3 : i32
    }
"""  # noqa: E501


@pytest.mark.parametrize(("bound", "count"), [("i", 0), ("first", 0), ("start_2", 1)])
def test_a_loop_bounded_by_a_carried_value_is_found(bound: str, count: int) -> None:
    assert len(carried_bounds(LOOPS.replace("BOUND", bound))) == count


PTX = """
.visible .entry kernel()
$L__BB0_1:                              // %loop
	ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%r9];
	{ .reg .b32 z; mov.b32 z, 0; max.NaN.bf16x2 %r3, %r1, z; }
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r5,%r6}, {%r3,%r2}, %rd1, %p1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	FIRST
	st.shared.b32 [%r3], %r2;
	@%p2 bra $L__BB0_1;
	wgmma.wait_group.sync.aligned 0;
"""


@pytest.mark.parametrize(
    ("first", "count"),
    [
        ("wgmma.wait_group.sync.aligned 0;", 0),
        ("wgmma.wait_group.sync.aligned 1;", 2 * 2),
        ("wgmma.wait_group.sync.aligned 0;\n\tmov.b32 %r3, %r4;", 0),
        ("mov.b32 %r3, %r4;\n\twgmma.wait_group.sync.aligned 0;", 3),
    ],
)
def test_registers_overwritten_too_early_are_found(first: str, count: int) -> None:
    assert len(overwritten(PTX.replace("FIRST", first))) == count
