"""Measures tiles of a plan's launches on a GPU and writes the best into its tuning table.

    python -m lgcnet_fast.deploy.tune GENOTYPE HEIGHT WIDTH fp16 --batch 1 --seconds 300

GENOTYPE: the name of one that comes with the package, as `reference`, or a file; its weights do
not matter. Launches are taken in turn, the slowest first, until the time is over. For each, one
property of the tile after another is tried: pixels and warps, block of input channels, stages.
Times are those of the launch alone, replayed from a CUDA graph with its maps in the cache, as in
the network.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.fused import Call, FusedNetwork
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Tile
from lgcnet_fast.ops import tuning
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import registered_spaces

if TYPE_CHECKING:
    from lgcnet_fast.kernels.infer_tile import TileConfig

OPERATION = "infer_tile"
GAIN = 0.97
"""A candidate replaces what was best so far if it takes less than this share of its time."""
REPEATS = 20
"""Launches of one graph."""
PIXELS = ((2, 8), (4, 8), (8, 8), (4, 16), (8, 16), (1, 16))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Measure = Callable[[Call], float]
"""Microseconds of a launch."""


@dataclass(frozen=True)
class TunedTile:
    key: str
    """As `Plan.key_of` gives it."""
    default_us: float
    best: TileConfig
    best_us: float


def variants(best: TileConfig, matrix_units: bool) -> Generator[list[TileConfig], TileConfig, None]:
    """Candidates around the best so far, one property at a time; send in the new best.

    Pixels and warps go together, as one decides which of the other Triton compiles rightly.
    """
    shapes = [
        replace(best, rows=rows, columns=columns, warps=warps)
        for (rows, columns), warps in product(PIXELS, (2, 4, 8))
    ]
    best = yield [config for config in shapes if not config.is_miscompiled(matrix_units)]
    blocks = (32, 64, 128) if matrix_units else (16, 32)
    best = yield [replace(best, block_k=block) for block in blocks]
    yield [replace(best, stages=stages) for stages in (1, 2, 3, 4)]


def tune_tile(network: FusedNetwork, tile: Tile, measure: Measure) -> TunedTile:
    """The best tile of one launch. A candidate that does not fit on the GPU is passed over."""
    best = network.tile_config(tile)
    tried = {best: measure(network.tile_call(tile, best))}
    default_us = tried[best]
    rounds = variants(best, matrix_units=network.matrix_units)
    candidates = next(rounds)
    while True:
        for candidate in candidates:
            if candidate not in tried:
                tried[candidate] = _measured(network, tile, candidate, measure)
            if tried[candidate] < GAIN * tried[best]:
                best = candidate
        try:
            candidates = rounds.send(best)
        except StopIteration:
            return TunedTile(network.plan.key_of(tile), default_us, best, tried[best])


def _measured(network: FusedNetwork, tile: Tile, config: TileConfig, measure: Measure) -> float:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        return measure(network.tile_call(tile, config))
    except (OutOfResources, CompilationError):
        return float("inf")


def tune_network(
    network: FusedNetwork,
    seconds: float,
    measure: Measure | None = None,
    report: Callable[[TunedTile], None] = lambda tuned: None,
) -> list[TunedTile]:
    """The launches that make a difference first; equal launches once."""
    measure = measure or microseconds
    end = time.monotonic() + seconds
    tiles: dict[str, Tile] = {}
    for launch in network.plan.launches:
        if isinstance(launch, Tile):
            tiles.setdefault(network.plan.key_of(launch), launch)
    network.run()
    times = {
        key: measure(network.tile_call(tile, network.tile_config(tile)))
        for key, tile in tiles.items()
    }
    found = []
    for key in sorted(tiles, key=lambda key: -times[key]):
        if time.monotonic() > end:
            break
        found.append(tune_tile(network, tiles[key], measure))
        report(found[-1])
    return found


def microseconds(call: Call) -> float:
    """Median over replays of a CUDA graph of `REPEATS` launches."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    graph.replay()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / REPEATS)
    return statistics.median(times)


def with_tiles(
    table: tuning.TuningTable | None, device_name: str, found: Sequence[TunedTile]
) -> tuning.TuningTable:
    """The table with these tiles laid over its own; without a table, one with nothing else."""
    if table is None:
        table = tuning.TuningTable(
            device=device_name, measured={"torch": torch.__version__}, backends={}
        )
    tiles = table.configs.get(OPERATION, {}) | {tuned.key: asdict(tuned.best) for tuned in found}
    return table.model_copy(update={"configs": table.configs | {OPERATION: tiles}})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lgcnet_fast.deploy.tune")
    parser.add_argument("genotype")
    parser.add_argument("height", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("dtype", choices=sorted(DTYPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--folder", type=Path, default=tuning.FOLDER, help="of the tables")
    chosen = parser.parse_args(arguments)

    device = torch.device("cuda")
    genotype = load_genotype(chosen.genotype)
    folded = fold(registered_spaces()[genotype.space].build(genotype, 19).eval())
    size = (chosen.height, chosen.width)
    packing = Packing(device, DTYPES[chosen.dtype])
    network = FusedNetwork(lower(folded, size, chosen.batch, packing), device)
    network.image.random_(0, 256)
    found = tune_network(
        network,
        chosen.seconds,
        report=lambda t: print(f"{t.default_us:8.2f} -> {t.best_us:8.2f} us  {t.key}", flush=True),
    )
    name = torch.cuda.get_device_name(device)
    path = tuning.table_path(name, chosen.folder)
    table = tuning.read_table(path) if path.exists() else None
    print(tuning.write_table(with_tiles(table, name, found), chosen.folder))


if __name__ == "__main__":
    main()
