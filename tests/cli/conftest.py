"""The command line on data and networks so small that a whole run takes seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lgcnet_fast.cli import app

TINY = """
precision = "fp32"
[data]
synthetic_images = 8
synthetic_size = [48, 96]
cache_dir = "cache"
[space]
cells = 3
reductions = [1, 2]
taps = [0, 1, 2]
widths = [4, 8, 16]
[latency]
size = [49, 97]
[search]
epochs = 1
batch_size = 4
augmentation = { crop = [33, 33] }
[pretrain]
epochs = 1
batch_size = 8
image_size = 32
synthetic_images = 16
[finetune]
epochs = 1
batch_size = 4
augmentation = { crop = [33, 65] }
[evaluate]
size = [49, 97]
"""

Lgcnet = Callable[..., "Result"]


class Result:
    """What a user sees of one command."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        done = CliRunner().invoke(app, arguments)
        self.status, self.out, self.err = done.exit_code, done.stdout, done.stderr
        self.bug = None if isinstance(done.exception, SystemExit) else done.exception


def call(*arguments: object) -> Result:
    """Runs `lgcnet` in this process; an exception that would be a traceback fails the test."""
    result = Result(tuple(str(argument) for argument in arguments))
    if result.bug is not None:
        raise result.bug
    return result


def call_well(*arguments: object) -> Result:
    """`call` for commands that succeed."""
    result = call(*arguments)
    assert result.status == 0, result.err
    return result


def refusal(*arguments: object) -> str:
    """The message of a command that is refused with status 2."""
    result = call(*arguments)
    assert result.status == 2, (result.status, result.out, result.err)
    assert result.err and "Traceback" not in result.err
    return result.err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all stages done. Not to be changed: copy it with `copied_run`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(TINY)
    call_well("run", folder / "tiny.toml", "--preset", "smoke", "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
