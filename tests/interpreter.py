"""Triton's interpreter without work that it repeats."""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any


def patch_once_a_launch(interpreter: ModuleType) -> None:
    """Device functions run in the `triton.language` that their launch has patched.

    The interpreter looks through all of it again at every call of a device function, for a third
    of the time of a kernel, and finds it patched: of each module, one look in a launch is enough.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_new(fn: FunctionType) -> Any:
        if fn.__module__ in patched:
            return None
        patched.add(fn.__module__)
        return patch(fn)

    def launch_anew(*arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(*arguments, **named)

    interpreter._patch_lang = patch_new  # type: ignore[attr-defined]
    interpreter.GridExecutor.__call__ = launch_anew
