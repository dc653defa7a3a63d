"""What a step launches with tiles of the tuning table, and the sweep over tiles of each launch."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from unittest.mock import patch

import torch

from bench.kernels.comparison import Family, Sweep
from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops import tuning
from lgcnet_fast.ops.availability import is_interpreted

FAMILIES = (
    *("depthwise", "pointwise_backward", "conv3", "conv3_backward", "mixed_sum", "max_pool"),
    *("concat_upsample", "concat_pointwise", "upsample_loss", "products"),
)
Launch = tuple[str, str]
"""Operation and shape key, as tuning tables name them."""


def launches_of(step: Callable[[], object]) -> Counter[Launch]:
    """How often `step`, which runs for the first time, looks up which tile.

    As if the table were empty, so that one that is out of date can be made anew.
    """
    found: Counter[Launch] = Counter()

    def note(operation: str, key: str, device: torch.device) -> None:
        found[operation, key] += 1

    with patch.object(tuning, "config_for", note), _without_kernels():
        step()
    return found


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Triton neither compiles nor launches anything: what a step computes is garbage.

    Before Triton 3.4, which cannot leave kernels out, they run.
    """
    with ExitStack() as stack:
        capture = "lgcnet_fast.train.capture.compile_ahead"
        stack.enter_context(patch(capture, lambda rehearsal: None))
        if is_interpreted():
            interpreter = "triton.runtime.interpreter.InterpretedFunction.run"
            with suppress(AttributeError):
                stack.enter_context(patch(interpreter, lambda *arguments, **named: None))
        with suppress(ImportError):
            from triton import knobs

            stack.enter_context(knobs.runtime.scope())
            knobs.runtime.jit_cache_hook = lambda **kernel: True
        yield


def family_named(name: str) -> Family:
    found: Family = importlib.import_module(f"bench.kernels.{name}").FAMILY
    return found


def family_of(operation: str) -> str:
    """Raises `BackendError` if there is none."""
    for name in FAMILIES:
        if operation in family_named(name).swept:
            return name
    raise BackendError(
        f"{operation}: no family of bench/kernels sweeps the tiles of this operation; "
        "add it to `swept` of the FAMILY that has its kernel"
    )


def sweep_of(launch: Launch) -> Sweep:
    """Raises `BackendError` for an operation or a key that no family knows."""
    operation, key = launch
    return family_named(family_of(operation)).swept[operation](key)
