"""Tiles of the deploy engine's launches: `python -m bench.kernels.infer_tile --part sweep`.

Of every launch of the reference network at batch 1; bench/deploy.py compares whole networks.
Maps are warm in the L2 cache here, as they are in the network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.device import DEVICE
from bench.genotypes import RANDOM, genotype_named
from bench.kernels.command import main
from bench.kernels.comparison import Comparison, Family, Part, Sweep
from bench.kernels.shapes import CLASSES, Size
from lgcnet_fast.benchmark.networks import random_network, settle_batch_norms
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.fused import FusedNetwork
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Plan, Tile
from lgcnet_fast.deploy.tune import candidates
from lgcnet_fast.kernels.infer_tile_config import TileConfig

SIZES: tuple[Size, ...] = ((769, 1537), (360, 480))
DTYPES = (torch.float16, torch.float32)
TINY = {"cells": 5, "reductions": (1, 3), "widths": (8, 8, 8)}


def comparisons(part: Part) -> Iterator[Comparison]:
    yield from ()


def sweeps(tiny: bool) -> Iterator[Sweep]:
    for size in (None,) if tiny else SIZES:
        yield from _sweeps(size)


def _sweeps(size: Size | None) -> Iterator[Sweep]:
    for dtype in DTYPES if size else DTYPES[1:]:
        plan, seen = _plan(size, dtype), set()
        for index, launch in enumerate(plan.launches):
            if not isinstance(launch, Tile) or plan.key_of(launch) in seen:
                continue
            seen.add(plan.key_of(launch))
            yield _sweep(plan, index, launch, size)
            if size is None:
                return


def _plan(size: Size | None, dtype: torch.dtype) -> Plan:
    genotype = genotype_named("reference") if size else genotype_named(RANDOM[0], TINY)
    network = random_network(genotype, CLASSES)
    settle_batch_norms(network)
    return lower(fold(network), size or (33, 33), 1, Packing(DEVICE, dtype))


def _sweep(plan: Plan, index: int, launch: Tile, size: Size | None) -> Sweep:
    configs = candidates(FusedNetwork(plan, DEVICE), launch)
    networks: dict[TileConfig, FusedNetwork] = {}

    def run(_: object, config: TileConfig) -> None:
        if config not in networks:
            networks.clear()
            networks[config] = FusedNetwork(plan, DEVICE, configs={launch.name: config})
        networks[config].calls[index]()

    return Sweep(
        operation="infer_tile",
        key=plan.key_of(launch),
        bytes=sum(map(plan.bytes_of, {*launch.reads, *launch.writes})),
        make=_nothing,
        run=run,
        configs=configs if size else configs[:1],
    )


def _nothing() -> None:
    """The maps belong to the network."""


FAMILY = Family("tiles of the deploy engine", comparisons, sweeps)

if __name__ == "__main__":
    main(FAMILY)
