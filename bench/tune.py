"""Makes the tuning table of this GPU: which tile for a shape, which backend for an operation.

    python -m bench.tune --out FILE [--size 256x512 ...] [--families depthwise ...] [--copy FOLDER]

First the tiles of each family of kernels, compiled in several processes and timed in this one;
then, with the tiles found, every operation on every backend, each checked against float64. The
table is written after every step, and keeps what it holds already of other shapes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.device import DEVICE, require_gpu, use_fastest_convolutions
from bench.genotypes import genotype_named
from bench.kernels.command import print_sweep
from bench.kernels.comparison import Row, Size
from bench.kernels.operation_cases import OperationCase, cases
from bench.kernels.operations import both_ways, check
from bench.kernels.shapes import CLASSES
from bench.kernels.timing import copy_bandwidth, in_turn
from bench.kernels.warm import chosen_sweeps, compile_together
from bench.options import Deadline, image_size, parser
from bench.results_file import Rows, provenance
from bench.rounds import median
from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.engines import network_blueprint
from lgcnet_fast.benchmark.networks import random_network, settle_batch_norms
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.errors import BackendError, UserError
from lgcnet_fast.latency.timing import back_to_back_ms
from lgcnet_fast.ops.backend import BACKENDS, use_backend
from lgcnet_fast.ops.tuning import FOLDER, TuningTable, read_table, table_path, write_table

FAMILIES = (
    *("depthwise", "pointwise_backward", "conv3_backward", "mixed_sum", "max_pool"),
    *("concat_upsample", "concat_pointwise", "upsample_loss", "infer_tile"),
)
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
    use_fastest_convolutions()
    origin = provenance(options.commit)
    folders = [options.folder, *([options.copy] if options.copy else [])]
    tuning = Tuning(origin, folders)
    rows = Rows(options.out, origin, lambda row: (row["operation"], row.get("key", "")))
    sizes = [] if options.dry else options.size
    for family in options.families:
        if not deadline.over:
            tune_tiles(family, sizes, options.jobs, tuning, rows, deadline)
            tuning.write()
    if options.backends and not deadline.over:
        choose_backends(sizes[0] if sizes else None, tuning, rows)
        tuning.write()
        choose_engine((33, 33) if options.dry else ENGINE_SIZE, tuning, rows)
        tuning.write()
    print(f"{table_path(origin['device'], folders[0]).name}: {tuning.backends}")


def tune_tiles(
    family: str,
    sizes: Sequence[Size],
    jobs: int,
    tuning: Tuning,
    rows: Rows,
    deadline: Deadline,
) -> None:
    if sizes and jobs > 1:
        count = compile_together(family, sizes, jobs, deadline.left)
        print(f"{family}: {count} configurations compiled, {deadline.left:.0f} s left", flush=True)
    bandwidth = copy_bandwidth()
    for sweep in chosen_sweeps(family, sizes):
        if deadline.over:
            print(f"out of time: {sweep} and what follows left out")
            return
        row = sweep.measure(bandwidth)
        print_sweep(row)
        rows.add(row)
        tuning.take(row)


def choose_backends(size: Size | None, tuning: Tuning, rows: Rows) -> None:
    """The backend with the least geometric mean of times over the cases that all can serve."""
    logarithms: dict[str, dict[str, list[float]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(size, dtype):
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


def _options() -> argparse.Namespace:
    options = parser("tuning table of this GPU")
    options.add_argument(
        "--size", type=image_size, nargs="+", default=[(256, 512)], help="of inputs"
    )
    options.add_argument("--families", choices=FAMILIES, nargs="*", default=list(FAMILIES))
    options.add_argument("--no-backends", dest="backends", action="store_false")
    options.add_argument("--jobs", type=int, default=8, help="processes that compile")
    options.add_argument("--folder", type=Path, default=FOLDER, help="of the table")
    options.add_argument("--copy", type=Path, help="a second folder for it")
    options.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    return options.parse_args()


if __name__ == "__main__":
    main()
