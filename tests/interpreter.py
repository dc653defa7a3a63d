"""Triton's interpreter without work that it repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any


def patch(interpreter: ModuleType) -> None:
    """Make `triton.runtime.interpreter` take less than half the time for the same results."""
    patch_once_a_launch(interpreter)
    skip_unread_checks(interpreter)
    interpreter._get_np_dtype = once_a_name(interpreter._get_np_dtype)  # type: ignore[attr-defined]
    core = interpreter.tl.core
    once_a_block_type(core)
    once_a_shape(core)


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


def skip_unread_checks(interpreter: ModuleType) -> None:
    """No check of overflows in the second launch of every sum and product of whole numbers.

    The interpreter computes each again in int64, compares, and drops what it finds, since it
    asserts on a device when debugging only.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def once_a_name(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's type of a Triton type, which has one name, without a new table at each look."""
    found: dict[str, Any] = {}

    def find(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = np_dtype(dtype)
        return found[dtype.name]

    return find


def once_a_block_type(core: ModuleType) -> None:
    """Types of blocks, which nothing changes, are checked and named once."""
    make = core.block_type.__init__
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def make_once(self: Any, element_ty: Any, shape: Any) -> None:
        if not all(type(size) is int for size in shape):
            make(self, element_ty, shape)
            return
        key = element_ty.name, tuple(shape)
        if key not in found:
            make(self, element_ty, shape)
            found[key] = dict(vars(self))
        vars(self).update(found[key])

    core.block_type.__init__ = make_once


def once_a_shape(core: ModuleType) -> None:
    """Tensors of one type share their sizes as constants, which nothing changes."""
    make = core.tensor.__init__
    found: dict[str, tuple[Any, Any]] = {}

    def make_once(self: Any, handle: Any, type: Any) -> None:
        if type.name not in found:
            make(self, handle, type)
            found[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found[type.name]

    core.tensor.__init__ = make_once
