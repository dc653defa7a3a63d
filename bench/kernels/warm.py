"""Compiling the configurations of sweeps beforehand, in several processes at once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from bench.device import release_memory
from bench.kernels.comparison import Size, Sweep
from bench.kernels.timing import CANNOT_RUN
from bench.process import WorkerFailed, Workers

TARGET = "bench.kernels.warm:Compiler"


class Compiler:
    """What each of the processes does; Triton keeps what it compiles on disk."""

    def compile(self, family: str, sizes: list[list[int]], part: int, parts: int) -> int:
        """Runs every `parts`-th configuration once; how many."""
        number = count = 0
        for sweep in chosen_sweeps(family, [tuple(size) for size in sizes]):
            inputs = None
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


def chosen_sweeps(family: str, sizes: Sequence[Size]) -> Iterator[Sweep]:
    """Of the shapes that inputs of these sizes lead to; of tiny ones if there are no sizes."""
    found = importlib.import_module(f"bench.kernels.{family}").FAMILY.sweeps(not sizes)
    return (sweep for sweep in found if sweep.input is None or sweep.input in sizes)


def compile_together(family: str, sizes: Sequence[Size], jobs: int, within: float) -> int:
    """Number of configurations that ran in `jobs` processes."""

    def compile_part(part: int) -> int:
        with Workers(TARGET) as workers:
            try:
                return workers.ask(
                    "compile", within, family=family, sizes=list(sizes), part=part, parts=jobs
                )
            except WorkerFailed as error:
                print(f"compiling {family}, part {part}: {error}")
                return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(compile_part, range(jobs)))
