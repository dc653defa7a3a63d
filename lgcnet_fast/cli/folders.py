"""Run folders as the command line names them: one seed, or several in seed-N folders."""

from __future__ import annotations

from pathlib import Path

from lgcnet_fast.config import RunConfig
from lgcnet_fast.deploy.run_folder import read_config, seed_folders
from lgcnet_fast.train.run import Run


def stored_config(folder: Path) -> RunConfig:
    """The configuration that `folder` was begun with, with all its seeds. Raises `RunError`."""
    configs = [read_config(path) for path in seed_folders(folder)]
    seeds = tuple(seed for config in configs for seed in config.seeds)
    return configs[0].model_copy(update={"seeds": seeds})


def open_runs(folder: Path) -> list[Run]:
    """Every seed's run in `folder`. Raises `RunError`."""
    return [Run.open(path) for path in seed_folders(folder)]


def read_run(folder: Path, device: str | None, backend: str) -> Run:
    """The run in `folder`, to predict with. Raises `RunError` if it holds several seeds."""
    seeds = seed_folders(folder)
    return Run.read(seeds[0] if len(seeds) == 1 else folder, device, backend)
