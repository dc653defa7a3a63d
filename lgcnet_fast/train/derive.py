"""From architecture parameters to the genotype that is trained: genotype.json.

A genotype comes from a search, from the random baseline, or from the configuration.
"""

from __future__ import annotations

from typing import Any

import torch

from lgcnet_fast.errors import GenotypeError, RunError
from lgcnet_fast.space.base import Arch
from lgcnet_fast.space.genotype import Genotype, load_genotype, save_genotype
from lgcnet_fast.train.checkpoint import read_checkpoint
from lgcnet_fast.train.prediction import LatencyPredictor, latency_predictor
from lgcnet_fast.train.price import within_target
from lgcnet_fast.train.run import Run

STAGE = "derive"
RANDOM_DRAWS = 100_000
"""Draws after which the random baseline gives up on `search.min_fps`."""


def derive(run: Run) -> dict[str, Any]:
    """Writes genotype.json; returns its origin, predicted latency, size and changes.

    `changes` has one line for each choice that differs from the argmax of the search.
    """
    predictor = latency_predictor(run)
    genotype, origin, changes = _choose(run, predictor)
    network = run.space.build(genotype, run.num_classes)
    milliseconds = predictor.milliseconds(genotype)
    if run.ranks.first:
        save_genotype(genotype, run.genotype_path)
    result = {
        "origin": origin,
        "latency_ms": milliseconds,
        "fps": 1000 / milliseconds,
        "latency_table": predictor.description,
        "parameters": sum(p.numel() for p in network.parameters()),
        "changes": list(changes),
    }
    return run.finish(STAGE, result)


def _choose(run: Run, predictor: LatencyPredictor) -> tuple[Genotype, str, tuple[str, ...]]:
    search = run.config.search
    if run.config.genotype is not None:
        return given_genotype(run), "given", ()
    if search.strategy == "random":
        return draw_random(run, predictor), "random", ()
    arch = searched_arch(run)
    genotype, changes = run.space.discretise(arch)
    if search.latency_target_ms is not None:
        genotype, changes = within_target(run.space, arch, predictor, search.latency_target_ms)
    return genotype, "search", changes


def searched_arch(run: Run) -> Arch:
    """alpha' (float32, CPU) at the end of the search; raises `RunError` if it has not ended."""
    if not run.stage_done("search"):
        raise RunError(f"{run.folder}: the search is not finished; run the stage search first")
    path = run.checkpoint_path("search")
    module = run.space.build_arch()
    try:
        module.load_state_dict(read_checkpoint(path, "search")["parts"]["arch"])
    except (KeyError, TypeError, RuntimeError):
        raise RunError(f"{path}: holds the architecture of another search space") from None
    with torch.no_grad():
        return {name: logits.detach().float() for name, logits in module().items()}


def draw_random(run: Run, predictor: LatencyPredictor) -> Genotype:
    """Uniform genotype of the run's seed; with `search.min_fps` the first draw above it.

    Raises `RunError` if none of `RANDOM_DRAWS` is fast enough.
    """
    generator = torch.Generator().manual_seed(run.seed)
    min_fps = run.config.search.min_fps
    fastest = 0.0
    for _ in range(RANDOM_DRAWS if min_fps is not None else 1):
        genotype = run.space.random_genotype(generator)
        fps = 1000 / predictor.milliseconds(genotype)
        if min_fps is None or fps > min_fps:
            return genotype
        fastest = max(fastest, fps)
    raise RunError(
        f"none of {RANDOM_DRAWS} random genotypes is faster than search.min_fps = {min_fps}; "
        f"the fastest has {fastest:.1f} FPS; lower search.min_fps below that"
    )


def given_genotype(run: Run) -> Genotype:
    """The genotype that the configuration names; raises `GenotypeError` if it does not fit."""
    name = str(run.config.genotype)
    genotype = load_genotype(name)
    if not isinstance(genotype, run.space.Genotype):
        raise GenotypeError(
            f"genotype {name}: belongs to the space {genotype.space!r}, "
            f'not to space.name = "{run.space.name}"'
        )
    return genotype
