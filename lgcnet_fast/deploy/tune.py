"""Measures tiles of a plan's launches on a GPU and writes the best into its tuning table.

    python -m lgcnet_fast.deploy.tune GENOTYPE HEIGHT WIDTH fp16 --batch 1 --seconds 200

GENOTYPE: the name of one that comes with the package, as `reference`, or a file; its weights do
not matter. Processes first compile what may be tried. Then launches are taken in turn, the slowest
first, until the time is over; the table is written after each. Times are those of the launch alone,
replayed from a CUDA graph with its maps in the cache, as in the network.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.fused import Call, FusedNetwork
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Tile
from lgcnet_fast.ops import tuning
from lgcnet_fast.parallel import in_processes
from lgcnet_fast.recording import recording
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import registered_spaces

if TYPE_CHECKING:
    from lgcnet_fast.kernels.infer_tile_config import TileConfig

OPERATION = "infer_tile"
GAIN = 0.97
"""A candidate replaces what was best so far if it takes less than this share of its time."""
REPEATS = 20
"""Launches of one graph."""
SMALL = 2**13
"""Pixels of a map from which on instructions count rather than waiting for memory."""
SMALL_MAPS = (
    (8, 8, 64, 8, 3, 9), (8, 8, 128, 8, 2, 9), (4, 8, 128, 8, 2, 9), (4, 8, 64, 8, 3, 9),
    (2, 8, 128, 8, 2, 9), (2, 8, 64, 4, 3, 9), (4, 8, 64, 4, 2, 3),
)  # fmt: skip
LARGE_MAPS = (
    (8, 8, 64, 8, 2, 9), (8, 8, 64, 8, 2, 3), (4, 8, 64, 4, 2, 9), (4, 8, 64, 4, 2, 3),
    (4, 8, 32, 2, 2, 3), (4, 8, 16, 2, 2, 3), (4, 8, 16, 2, 2, 9),
)  # fmt: skip
WITHOUT_MATRIX_UNITS = (
    (4, 8, 16, 4, 1, 3), (4, 8, 16, 8, 1, 3), (8, 8, 16, 8, 1, 3), (8, 8, 16, 4, 1, 3),
    (2, 8, 16, 4, 1, 3), (4, 8, 32, 8, 1, 3), (2, 8, 32, 4, 1, 3),
)  # fmt: skip
"""Fields of `TileConfig`, in its order."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Between the results of two tiles, relative to the largest value."""
Measure = Callable[[Tile, "TileConfig"], float]
"""Microseconds of a launch; inf where the tile cannot serve."""


@dataclass(frozen=True)
class TunedTile:
    key: str
    """As `Plan.key_of` gives it."""
    default_us: float
    best: TileConfig
    best_us: float


@dataclass(frozen=True)
class Recipe:
    """The network whose launches are tuned; can be sent to other processes."""

    genotype: str
    size: tuple[int, int]
    batch: int
    dtype: str

    def compile(self, key: str) -> None:
        """Every candidate of a launch, into the cache that all processes share."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources

        network = _network(self)
        for config in candidates(network, launches(network)[key]):
            try:
                network.tile_call(launches(network)[key], config)()
            except (OutOfResources, CompilationError):
                continue
        torch.cuda.synchronize()


@cache
def _network(recipe: Recipe) -> FusedNetwork:
    device = torch.device("cuda")
    genotype = load_genotype(recipe.genotype)
    folded = fold(registered_spaces()[genotype.space].build(genotype, 19).eval())
    packing = Packing(device, DTYPES[recipe.dtype])
    return FusedNetwork(lower(folded, recipe.size, recipe.batch, packing), device)


def launches(network: FusedNetwork) -> dict[str, Tile]:
    """Those of nodes by key, equal ones once."""
    tiles = (launch for launch in network.plan.launches if isinstance(launch, Tile))
    return {network.plan.key_of(tile): tile for tile in tiles}


def candidates(network: FusedNetwork, tile: Tile) -> list[TileConfig]:
    """At most 8: what the engine takes now, then others for maps of this size."""
    from lgcnet_fast.kernels.infer_tile_config import TileConfig

    height, width = tile.out.size
    if not network.matrix_units:
        others = WITHOUT_MATRIX_UNITS
    elif network.plan.batch * height * width < SMALL:
        others = SMALL_MAPS
    else:
        others = LARGE_MAPS
    configs = [network.tile_config(tile), *(TileConfig(*fields) for fields in others)]
    right = (config for config in configs if not config.is_miscompiled(network.matrix_units))
    return list(dict.fromkeys(right))


def tune_tile(network: FusedNetwork, tile: Tile, measure: Measure) -> TunedTile:
    """The best tile of one launch."""
    best, *others = candidates(network, tile)
    default_us = best_us = measure(tile, best)
    for config in others:
        found = measure(tile, config)
        if found < GAIN * best_us:
            best, best_us = config, found
    return TunedTile(network.plan.key_of(tile), default_us, best, best_us)


def tune_network(
    network: FusedNetwork,
    seconds: float,
    measure: Measure | None = None,
    report: Callable[[TunedTile], None] = lambda tuned: None,
) -> list[TunedTile]:
    """The launches that make a difference first."""
    measure = measure or OnGpu(network)
    end = time.monotonic() + seconds
    tiles = launches(network)
    times = {key: measure(tile, network.tile_config(tile)) for key, tile in tiles.items()}
    found = []
    for key in sorted(tiles, key=lambda key: -times[key]):
        if time.monotonic() > end:
            break
        found.append(tune_tile(network, tiles[key], measure))
        report(found[-1])
    return found


class OnGpu:
    """Times launches, on maps of random numbers, and looks whether tiles agree on the result."""

    def __init__(self, network: FusedNetwork) -> None:
        self._network = network
        self._random = torch.Generator(network.arena.device)

    def __call__(self, tile: Tile, config: TileConfig) -> float:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources

        call = self._network.tile_call(tile, config)
        try:
            if not self._agree(self._results(tile), self._results(tile, config)):
                return float("inf")
            return microseconds(call)
        except (OutOfResources, CompilationError):
            return float("inf")

    def _results(self, tile: Tile, config: TileConfig | None = None) -> list[Tensor]:
        # As small as a map's numbers, whichever maps lie there, and not what other launches have
        # made of them, which may no longer be finite.
        arena = self._network.arena.view(self._network.plan.dtype)
        arena.normal_(generator=self._random.manual_seed(0))
        written = self._network.written_by(tile)
        for data in written:
            data.zero_()
        self._network.tile_call(tile, config or self._network.tile_config(tile))()
        return [data.clone() for data in written]

    def _agree(self, expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
        tolerance = TOLERANCE[self._network.plan.dtype]
        return all(
            bool(((x - y).abs().max() <= tolerance * x.abs().max()).item())
            for x, y in zip(expected, found, strict=True)
        )


def microseconds(call: Call) -> float:
    """Median over replays of a CUDA graph of `REPEATS` launches."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    with recording(graph, stream):
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
    parser.add_argument("--seconds", type=float, default=200.0, help="in all")
    parser.add_argument("--folder", type=Path, default=tuning.FOLDER, help="of the tables")
    chosen = parser.parse_args(arguments)

    end = time.monotonic() + chosen.seconds
    recipe = Recipe(chosen.genotype, (chosen.height, chosen.width), chosen.batch, chosen.dtype)
    network = _network(recipe)
    in_processes(
        recipe.compile,
        list(launches(network)),
        lambda done, total: print(f"compiled for {done} of {total} launches", flush=True),
    )
    name = torch.cuda.get_device_name()
    path = tuning.table_path(name, chosen.folder)

    def report(tuned: TunedTile) -> None:
        table = tuning.read_table(path) if path.exists() else None
        tuning.write_table(with_tiles(table, name, [tuned]), chosen.folder)
        print(f"{tuned.default_us:8.2f} -> {tuned.best_us:8.2f} us  {tuned.key}", flush=True)

    tune_network(network, end - time.monotonic(), report=report)
    print(path)


if __name__ == "__main__":
    main()
