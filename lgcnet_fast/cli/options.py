"""Arguments and options that several commands share, and the configuration they make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lgcnet_fast.config import PRESETS, RunConfig, load_config
from lgcnet_fast.errors import ConfigError

ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.toml", help="Configuration; its keys replace the preset's."),
]
ConfigOrRun = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG.toml|RUN",
        help="Configuration, whose keys replace the preset's; or a run folder to continue.",
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run folder, or one of its seed-N folders."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(PRESETS),
        autocompletion=lambda: list(PRESETS),
        help="What the configuration builds on.  [default: paper]",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides one key; repeatable."),
]
DTYPES = ("fp32", "fp16", "bf16")
"""As deploy.engine.DTYPES, which cannot be imported here without torch."""
DtypeName = Annotated[
    str,
    typer.Option(
        metavar="|".join(DTYPES),
        autocompletion=lambda: list(DTYPES),
        help="Numbers that networks compute with.",
    ),
]
BACKENDS = ("auto", "triton", "cuda", "reference")
"""As in ops.backend, which cannot be imported here without torch."""
BackendName = Annotated[
    str,
    typer.Option(
        metavar="|".join(BACKENDS),
        autocompletion=lambda: list(BACKENDS),
        help="Kernels of engines.",
    ),
]
DeviceName = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda:N", help="auto: the first GPU, else the CPU.")
]
TableName = Annotated[
    str, typer.Argument(metavar="TABLE", help="A file, or a name of `lgcnet lut list`.")
]


def configuration(path: Path | None, preset: str | None, overrides: list[str] | None) -> RunConfig:
    """The validated configuration, space options included. Raises `ConfigError`."""
    config = load_config(path, preset or "paper", tuple(overrides or ()))
    from lgcnet_fast.space.registry import make_space

    make_space(config.space)
    return config


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of a text such as 360x480. Raises `ConfigError`."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if match is None:
        raise ConfigError(f"--size {text!r}: write height x width, as in 360x480")
    return int(match[1]), int(match[2])
