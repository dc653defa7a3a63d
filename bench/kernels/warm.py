"""Compiling the configurations of sweeps beforehand, in several processes at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from bench.device import release_memory
from bench.kernels.launches import Launch, sweep_of
from bench.kernels.timing import CANNOT_RUN
from bench.process import WorkerFailed, Workers

TARGET = "bench.kernels.warm:Compiler"


class Compiler:
    """What each of the processes does; Triton keeps what it compiles on disk."""

    def compile(self, launches: list[list[str]], part: int, parts: int) -> int:
        """Runs every `parts`-th configuration once; how many."""
        number = count = 0
        for operation, key in launches:
            sweep, inputs = sweep_of((operation, key)), None
            for config in sweep.configs:
                number += 1
                if number % parts != part:
                    continue
                inputs = (sweep.make(),) if inputs is None else inputs
                try:
                    sweep.run(inputs[0], config)
                    count += 1
                except CANNOT_RUN as error:
                    print(f"{sweep} {config}: {error}")
            del inputs
            release_memory()
        torch.cuda.synchronize()
        return count


def compile_together(launches: Sequence[Launch], jobs: int, within: float) -> int:
    """Number of configurations that ran in `jobs` processes."""

    def compile_part(part: int) -> int:
        with Workers(TARGET) as workers:
            try:
                return workers.ask(
                    "compile", within, launches=list(launches), part=part, parts=jobs
                )
            except WorkerFailed as error:
                print(f"compiling, part {part}: {error}")
                return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(compile_part, range(jobs)))
