"""Help, completion, exit statuses: what holds for every command."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lgcnet_fast import __version__
from lgcnet_fast.cli import app, stages
from lgcnet_fast.errors import DataError
from tests.cli.conftest import call, call_well, refusal

COMMANDS = [
    ("run",), ("search",), ("derive",), ("pretrain",), ("finetune",), ("eval",), ("predict",),
    ("lut",), ("lut", "build"), ("lut", "show"), ("data",), ("data", "check"), ("data", "show"),
    ("doctor",), ("export",),
]  # fmt: skip

MAIN = "from lgcnet_fast.cli import main; main()"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        assert "Usage" in call_well(*command, flag).out


@pytest.mark.parametrize("command", ["run", "search", "predict"])
def test_help_has_examples(command: str) -> None:
    assert f"lgcnet {command} " in call_well(command, "--help").out


def test_without_arguments_the_commands_are_listed() -> None:
    shown = call()
    assert "finetune" in shown.out + shown.err


def test_version() -> None:
    assert call_well("--version").out.split() == ["lgcnet", __version__]


def test_help_is_fast_and_leaves_torch_alone() -> None:
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    before = _children_seconds()
    shown = subprocess.run(
        [sys.executable, "-c", f"{check}; {MAIN}", "run", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.split()[-1] == "False"
    assert _children_seconds() - before < 2


def _children_seconds() -> float:
    """Processor time of ended child processes; other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_shell_completes_commands_and_presets() -> None:
    def completions(words: str) -> str:
        request = {"_LGCNET_COMPLETE": "complete_bash", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
        code = "import sys; sys.argv[0] = 'lgcnet'; " + MAIN
        run = [sys.executable, "-c", code]
        return subprocess.run(run, capture_output=True, text=True, env=os.environ | request).stdout

    assert "finetune" in completions("lgcnet fi")
    assert "smoke" in completions("lgcnet run --preset s")


@pytest.mark.parametrize("arguments", [("rnu",), ("run", "--sett", "a=1"), ("eval",), ("predict",)])
def test_wrong_usage_has_status_2(arguments: tuple[str, ...]) -> None:
    assert refusal(*arguments)


def raising(error: BaseException) -> object:
    def work(*_: object) -> None:
        raise error

    return work


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes `lgcnet derive x` raise the given exception."""
    return lambda error: monkeypatch.setattr(stages, "_stage_alone", raising(error))


def test_user_errors_are_messages(fail_with) -> None:
    fail_with(DataError("a.png: broken; mend it"))
    assert refusal("derive", "x") == "lgcnet: a.png: broken; mend it\n"


def test_files_that_cannot_be_written_are_user_errors(fail_with) -> None:
    fail_with(OSError(errno.ENOSPC, "No space left on device", "weights"))
    assert refusal("derive", "x") == "lgcnet: weights: No space left on device\n"


@pytest.mark.parametrize("bug", [RuntimeError("x"), KeyError("x"), OSError(errno.EBADF, "x")])
def test_bugs_stay_tracebacks(fail_with, bug: Exception) -> None:
    fail_with(bug)
    assert CliRunner().invoke(app, ["derive", "x"]).exception is bug


def test_ctrl_c_says_how_to_continue(fail_with) -> None:
    fail_with(KeyboardInterrupt())
    result = call("derive", "x")
    assert result.status == 130 and "same command" in result.err
