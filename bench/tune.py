"""Makes the tuning table of this GPU: which tile for a shape, which backend for an operation.

    python -m bench.tune --out FILE [--step search|finetune] [--size 256x512] [--batch 16]

First the tiles of all that the step launches, compiled in several processes and timed in this one,
what takes longest first; then, with the tiles found, every operation on every backend, each checked
against float64. The table is written after each of them, and keeps what it holds of other shapes.
Those of the deploy engine are for `python -m lgcnet_fast.deploy.tune`.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.device import DEVICE, release_memory, require_gpu, use_fastest_convolutions
from bench.genotypes import RANDOM, genotype_named
from bench.kernels.command import print_sweep
from bench.kernels.comparison import Row, Sweep
from bench.kernels.launches import FAMILIES, Launch, family_of, launches_of, sweep_of
from bench.kernels.operation_cases import OperationCase, cases
from bench.kernels.operations import both_ways, check
from bench.kernels.shapes import CLASSES, INPUTS, Size
from bench.kernels.timing import CANNOT_RUN, copy_bandwidth, in_turn
from bench.options import Deadline, image_size, parser
from bench.results_file import Rows, provenance
from bench.rounds import median
from bench.training import finetune, search
from bench.training.case import TrainingCase
from bench.training.command import TINY_SIZE, TINY_SPACE, TINY_SUPERNET
from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.engines import network_blueprint
from lgcnet_fast.benchmark.networks import random_network, settle_batch_norms
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.errors import BackendError, UserError
from lgcnet_fast.latency.timing import back_to_back_ms
from lgcnet_fast.ops.backend import BACKENDS, set_backend, use_backend
from lgcnet_fast.ops.compile_ahead import compile_ahead
from lgcnet_fast.ops.tuning import FOLDER, TuningTable, read_table, table_path, write_table

STEPS = {"search": search, "finetune": finetune}
SIZES = {"search": (256, 512), "finetune": (360, 480)}
LAUNCH_BYTES = 8 * 2**20
"""A launch that moves nothing takes about as long as moving so much."""
COMPILED_TOGETHER = 80
"""Sweeps, so that a command that ends early has measured what it has compiled."""
ENGINE, ENGINE_SIZE = "deploy_engine", (769, 1537)
GAIN = 0.97
"""A tile that is not even so much faster than the default is noise."""


class Tuning:
    """The table as it is so far, and where it goes."""

    def __init__(self, origin: dict[str, Any], folders: list[Path]) -> None:
        names = ("torch", "cuda", "python", "commit", "command")
        self._measured = {name: str(origin[name]) for name in names}
        self._measured["date"] = datetime.now(timezone.utc).date().isoformat()
        self._device, self._folders = origin["device"], folders
        path = table_path(self._device, folders[0])
        table = read_table(path) if path.exists() else None
        self.backends: dict[str, Any] = dict(table.backends) if table else {}
        self.configs: dict[str, dict[str, Any]] = (
            {name: dict(tiles) for name, tiles in table.configs.items()} if table else {}
        )

    def take(self, row: Row) -> None:
        """The best tile of a sweep, where it is better than the default."""
        best = row["configs"][0] if row["configs"] else None
        tiles = self.configs.setdefault(row["operation"], {})
        tiles.pop(row["key"], None)
        if best and (row["default_us"] is None or best["us"] < GAIN * row["default_us"]):
            tiles[row["key"]] = dict(best["config"])

    def write(self) -> None:
        table = TuningTable(
            device=self._device,
            measured=self._measured,
            backends=self.backends,
            configs={name: tiles for name, tiles in self.configs.items() if tiles},
        )
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            write_table(table, folder)


def main() -> None:
    options = _options()
    require_gpu(options.dry)
    deadline = Deadline(options.seconds)
    origin = provenance(options.commit)
    folders = [options.folder, *([options.copy] if options.copy else [])]
    tuning = Tuning(origin, folders)
    rows = Rows(options.out, origin, lambda row: (row["operation"], row.get("key", "")))
    counts = launches_of(STEPS[options.step].make_step("ours-triton", _case(options)))
    set_backend("auto")  # Making the step has changed it.
    release_memory()
    gc.freeze()  # What is there stays, and garbage is collected after every sweep.
    use_fastest_convolutions()
    chosen = [launch for launch in counts if family_of(launch[0]) in options.families]
    sweeps = sweeps_by_cost({launch: counts[launch] for launch in chosen})
    print(f"{len(sweeps)} of {len(counts)} tiles that the step looks up", flush=True)
    if options.dry:
        sweeps = [replace(sweep, configs=sweep.configs[:1]) for sweep in sweeps]
    tune_tiles(sweeps, tuning, rows, deadline)
    if options.backends and not deadline.over:
        choose_backends(None if options.dry else options.size, tuning, rows)
        tuning.write()
        choose_engine((33, 33) if options.dry else ENGINE_SIZE, tuning, rows)
        tuning.write()
    print(f"{table_path(origin['device'], folders[0]).name}: {tuning.backends}")


def sweeps_by_cost(counts: Mapping[Launch, int]) -> list[Sweep]:
    """Of launches, with how often a step has them; first those that take most of it."""
    sweeps = {launch: sweep_of(launch) for launch in counts}
    costs = {launch: counts[launch] * (LAUNCH_BYTES + sweeps[launch].bytes) for launch in counts}
    return [sweeps[launch] for launch in sorted(sweeps, key=lambda launch: -costs[launch])]


def tune_tiles(sweeps: Sequence[Sweep], tuning: Tuning, rows: Rows, deadline: Deadline) -> None:
    bandwidth = copy_bandwidth()
    for done, sweep in enumerate(sweeps):
        if deadline.over:
            print(f"out of time: {len(sweeps) - done} of {len(sweeps)} sweeps left out")
            break
        if done % COMPILED_TOGETHER == 0:
            compile_sweeps(sweeps[done : done + COMPILED_TOGETHER])
            print(f"compiled from {done} on, {deadline.left:.0f} s left", flush=True)
        row = sweep.measure(bandwidth)
        print_sweep(row)
        rows.add(row)
        tuning.take(row)
        tuning.write()


def compile_sweeps(sweeps: Sequence[Sweep]) -> None:
    """The kernels of all their configurations, each once, in processes on all cores."""

    def rehearsal() -> None:
        for sweep in sweeps:
            inputs = sweep.make()
            for config in sweep.configs:
                with suppress(*CANNOT_RUN):
                    sweep.run(inputs, config)

    compile_ahead(rehearsal)
    release_memory()


def choose_backends(size: Size | None, tuning: Tuning, rows: Rows) -> None:
    """The backend with the least geometric mean of times over the cases that all can serve."""
    logarithms: dict[str, dict[str, list[float]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for case in (one for one in cases(size, dtype) if one.tuned):
            seconds = _seconds_by_backend(case)
            rows.add({"operation": f"backends of {case.operation}", "key": str(case), **seconds})
            print(f"{case.operation} {case}: {_told(seconds)}", flush=True)
            known = logarithms.setdefault(case.operation, {name: [] for name in BACKENDS})
            for name in BACKENDS:
                known[name].append(math.log(seconds.get(name, math.inf)))
    for operation, known in logarithms.items():
        tuning.backends[operation] = min(known, key=lambda name: sum(known[name]))


def choose_engine(size: Size, tuning: Tuning, rows: Rows) -> None:
    """The backend of deployed networks, by the reference network in half and single precision."""
    genotype = genotype_named("reference")
    network = random_network(genotype, CLASSES)
    settle_batch_norms(network)
    blueprint = network_blueprint(network, genotype, CLASSES, size)
    logarithms: dict[str, float] = {}
    for dtype in ("fp16", "fp32"):
        images = Case(size, dtype=dtype).images(DEVICE)
        frames = {}
        for name in BACKENDS:
            try:
                engine = Engine(blueprint, DEVICE, dtype, name)
                engine.batch_labels(images)
            except UserError as error:
                print(f"    {name} left out: {error}")
                continue
            frames[name] = partial(engine.batch_labels, images)
        seconds = {name: 1e-3 * back_to_back_ms(frame, DEVICE) for name, frame in frames.items()}
        rows.add({"operation": f"backends of {ENGINE}", "key": dtype, **seconds})
        print(f"{ENGINE} {dtype}: {_told(seconds)}", flush=True)
        for name in BACKENDS:
            logarithm = math.log(seconds.get(name, math.inf))
            logarithms[name] = logarithms.get(name, 0) + logarithm
    tuning.backends[ENGINE] = min(logarithms, key=lambda name: logarithms[name])


def _seconds_by_backend(case: OperationCase) -> dict[str, float]:
    """Of backends that serve the case and are right."""
    inputs = [case.make() for _ in range(2)]
    serving = {}
    for name in BACKENDS:
        try:
            with use_backend(name, strict=True):
                check(case, case.make())
        except (BackendError, SystemExit) as error:
            print(f"    {name} left out: {error}")
            continue
        serving[name] = [lambda i=i, name=name: _run(case, i, name) for i in inputs]
    return {name: median(times) for name, times in in_turn(serving).items()}


def _run(case: OperationCase, inputs: list[torch.Tensor], backend: str) -> Any:
    with use_backend(backend, strict=True):
        return both_ways(case, case.ours, inputs)


def _told(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in seconds.items())


def _case(options: argparse.Namespace) -> TrainingCase:
    searching = options.step == "search"
    if options.dry:
        space = TINY_SUPERNET if searching else TINY_SPACE
        return TrainingCase(2, TINY_SIZE, options.precision, space, "" if searching else RANDOM[0])
    space = {"widths": options.widths} if searching else {}
    genotype = "" if searching else options.genotype
    return TrainingCase(options.batch, options.size, options.precision, space, genotype)


def _options() -> argparse.Namespace:
    found = parser("tuning table of this GPU")
    found.add_argument("--step", choices=STEPS, default="search", help="whose launches are tuned")
    found.add_argument("--size", type=image_size, help="of inputs; by default that of the step")
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    found.add_argument("--widths", type=int, nargs=3, default=[32, 64, 128], help="of the supernet")
    found.add_argument("--genotype", default="reference", help="that is finetuned")
    found.add_argument("--families", choices=FAMILIES, nargs="*", default=list(FAMILIES))
    found.add_argument("--no-backends", dest="backends", action="store_false")
    found.add_argument("--folder", type=Path, default=FOLDER, help="of the table")
    found.add_argument("--copy", type=Path, help="a second folder for it")
    found.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    options = found.parse_args()
    options.size = options.size or SIZES[options.step]
    if options.backends and not options.dry and options.size not in INPUTS:
        known = ", ".join(f"{height}x{width}" for height, width in INPUTS)
        found.error(f"backends are chosen at {known}; for another --size add --no-backends")
    return options


if __name__ == "__main__":
    main()
