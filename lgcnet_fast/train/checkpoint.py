"""Checkpoints: everything that the next epoch depends on, in one file, written atomically.

A stage that continues from its checkpoint follows the trajectory of a run that was never
interrupted: parameters, optimisers, loss scaler, random generators and counters all travel.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from lgcnet_fast.errors import RunError
from lgcnet_fast.files import replacing

FORMAT = "lgcnet-checkpoint"
VERSION = 1


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


def save_checkpoint(
    path: Path,
    stage: str,
    epochs_done: int,
    parts: Mapping[str, Stateful],
    generators: Mapping[str, torch.Generator],
) -> None:
    """Replaces `path` as a whole: a crash leaves the former file or the new one."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "epochs_done": epochs_done,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """The stored dictionary, on the CPU.

    Raises `RunError` if the file is absent, damaged or of another stage.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: no checkpoint here; run the stage {stage!r} first") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise RunError(
            f"{path}: damaged or not a checkpoint; delete it to start the stage {stage!r} afresh"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunError(f"{path}: not a checkpoint of lgcnet_fast; delete or move it")
    if state.get("version") != VERSION:
        raise RunError(
            f"{path}: checkpoint version {state.get('version')!r}, this program reads {VERSION}; "
            "continue with the program that wrote it, or delete the file"
        )
    if state.get("stage") != stage:
        raise RunError(f"{path}: belongs to the stage {state.get('stage')!r}, not to {stage!r}")
    return state


def load_checkpoint(
    path: Path,
    stage: str,
    parts: Mapping[str, Stateful],
    generators: Mapping[str, torch.Generator],
) -> int:
    """Restores `parts`, `generators` and torch's own generators; returns the epochs done.

    Raises `RunError` if the file does not fit the parts.
    """
    state = read_checkpoint(path, stage)
    try:
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        for name, generator in generators.items():
            generator.set_state(state["generators"][name])
        torch.set_rng_state(state["rng_cpu"])
        if torch.cuda.is_available() and len(state["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        return int(state["epochs_done"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{path}: does not fit this network ({first_line}); it was written with another "
            "configuration, genotype or device; use another run folder, or delete the file"
        ) from None
