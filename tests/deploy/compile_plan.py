"""Compiles every launch of the reference network's plan for one architecture, without a GPU.

    python -m tests.deploy.compile_plan 90 fp16

Prints a JSON line a kernel: registers, bytes of stack (spills) and of shared memory. Kernels get
the arguments of a real launch, so that their specialisation is checked too. Needs an interpreter
in which Triton compiles, so not one with TRITON_INTERPRET set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import driver

from lgcnet_fast.deploy import fused, packing
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.kernels import infer_pool, infer_stem, infer_tile
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import make_space
from tests.kernels.stand_in import StandIn

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KERNELS = (
    (infer_stem, "_stem_kernel"),
    (infer_tile, "_tile_kernel"),
    (infer_pool, "_sums_kernel"),
    (infer_pool, "_product_kernel"),
)


class Recorder:
    """In the place of a kernel: compiles it for the arguments of each launch."""

    def __init__(self, kernel: Any, compiled: dict[str, Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            key = f"{self.kernel.fn.__name__} {options}"
            if key not in self.compiled:
                self.compiled[key] = self.kernel.run(*arguments, grid=grid, warmup=True, **options)

        return compile_only


def resources(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "-res-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
    assert found, report.stdout
    registers, stack = map(int, found.groups())
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def launches(arch: int, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, int]]]:
    """The name and the resources of every kernel of the plan that differs from those before."""
    driver.set_active(StandIn(arch))
    matrix_units = arch >= 80 and dtype != torch.float32
    for module in (fused, packing):
        setattr(module, "has_matrix_units", lambda device, dtype: matrix_units)  # noqa: B010
    compiled: dict[str, Any] = {}
    for module, name in KERNELS:
        setattr(module, name, Recorder(getattr(module, name), compiled))
    space = make_space({"name": "lgcnet"})
    network = fold(space.build(load_genotype("reference"), 19).eval())
    cpu = torch.device("cpu")
    plan = lower(network, (769, 1537), 1, packing.Packing(cpu, dtype))
    calls = fused.FusedNetwork(plan, cpu).calls
    for launch, call in zip(plan.launches, calls, strict=True):
        known = len(compiled)
        call()
        for kernel in list(compiled.values())[known:]:
            yield launch.name, resources(kernel)


def main() -> None:
    for name, used in launches(int(sys.argv[1]), DTYPES[sys.argv[2]]):
        print(json.dumps({"launch": name} | used), flush=True)


if __name__ == "__main__":
    main()
