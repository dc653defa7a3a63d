"""Run folders as the command line names them: one seed, or several in seed-N folders."""

from __future__ import annotations

from pathlib import Path

from lgcnet_fast.config import RunConfig
from lgcnet_fast.errors import RunError
from lgcnet_fast.train.run import Run, read_config


def seed_folders(folder: Path) -> list[Path]:
    """`folder` itself, or its seed-N folders. Raises `RunError` if it holds no run."""
    if (folder / "config.json").is_file():
        return [folder]
    inside = [path.parent for path in folder.glob("seed-*/config.json")]
    if not inside:
        raise RunError(f"{folder}: not a run folder; `lgcnet run --out {folder}` begins one")
    return sorted(inside, key=lambda path: (len(path.name), path.name))


def stored_config(folder: Path) -> RunConfig:
    """The configuration that `folder` was begun with, with all its seeds. Raises `RunError`."""
    configs = [read_config(path) for path in seed_folders(folder)]
    seeds = tuple(seed for config in configs for seed in config.seeds)
    return configs[0].model_copy(update={"seeds": seeds})


def open_runs(folder: Path) -> list[Run]:
    """Every seed's run in `folder`. Raises `RunError`."""
    return [Run.open(path) for path in seed_folders(folder)]


def read_run(folder: Path, device: str | None) -> Run:
    """The run in `folder`, to predict with. Raises `RunError` if it holds several seeds."""
    folders = seed_folders(folder)
    if len(folders) > 1:
        names = ", ".join(str(path) for path in folders)
        raise RunError(f"{folder}: holds several seeds; name one of {names}")
    return Run.read(folders[0], device)
