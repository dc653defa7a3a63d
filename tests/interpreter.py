"""Triton's interpreter without work that it repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any


def patch(interpreter: Any) -> None:
    """Make `triton.runtime.interpreter` take a third of the time for the same results."""
    patch_once_a_launch(interpreter)
    skip_unread_checks(interpreter)
    interpreter._get_np_dtype = once_a_name(interpreter._get_np_dtype)
    interpreter._convert_float = shift_bfloat16(interpreter._convert_float)
    core = interpreter.tl.core
    unwrap_at_a_glance(core)
    once_a_block_type(core)
    once_a_shape(core)
    if hasattr(interpreter, "TritonSemantic"):
        leave_what_fits(interpreter.TritonSemantic, core.tensor)


def patch_once_a_launch(interpreter: Any) -> None:
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

    interpreter._patch_lang = patch_new
    interpreter.GridExecutor.__call__ = launch_anew


def skip_unread_checks(interpreter: Any) -> None:
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


def shift_bfloat16(convert: Callable[..., Any]) -> Callable[..., Any]:
    """bfloat16 is the upper half of float32, and so a shift away from it.

    The interpreter takes numbers apart, and gives the same but for subnormal ones, which it spoils.
    """

    def convert_others(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if rounding is None and (source.name, target.name) == ("bf16", "fp32"):
            return values.astype("uint32") << 16
        if rounding is None and (source.name, target.name) == ("fp32", "bf16"):
            return (values.view("uint32") >> 16).astype("uint16")
        return convert(values, source, target, rounding)

    return convert_others


def unwrap_at_a_glance(core: Any) -> None:
    """What is most often asked for its constant holds none."""
    unwrap = core._unwrap_if_constexpr
    plain = {core.tensor, core.dtype, int, float, bool, str, type(None)}

    def unwrap_others(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrap_others


def once_a_block_type(core: Any) -> None:
    """Types of blocks, which nothing changes, are checked and named once, and share shapes."""
    make = core.block_type.__init__
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}

    def make_once(self: Any, element_ty: Any, shape: Any) -> None:
        if not all(type(size) is int for size in shape):
            make(self, element_ty, shape)
            return
        sizes = tuple(shape)
        key = element_ty.name, sizes
        if key not in found:
            make(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            found[key] = dict(vars(self))
        vars(self).update(found[key])

    core.block_type.__init__ = make_once


def once_a_shape(core: Any) -> None:
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


def leave_what_fits(semantic: Any, tensor: type) -> None:
    """Operands of the same type and shape pass without a look at all the rules for others."""
    cast, check = semantic.cast, semantic.binary_op_type_checking_impl
    broadcast = semantic.broadcast_impl_value

    def cast_others(self: Any, input: Any, dtype: Any, rounding: str | None = None) -> Any:
        return input if input.dtype is dtype.scalar else cast(self, input, dtype, rounding)

    def broadcast_others(self: Any, left: Any, right: Any) -> Any:
        blocks = left.type.is_block() and right.type.is_block()
        if blocks and left.type.shape is right.type.shape:
            return left, right
        return broadcast(self, left, right)

    def check_others(
        self: Any,
        left: Any,
        right: Any,
        left_pointer: bool = False,
        right_pointer: bool = False,
        arithmetic: bool = True,
        divided: bool = False,
    ) -> Any:
        tensors = type(left) is tensor and type(right) is tensor
        if tensors and left.dtype is right.dtype and not (left.dtype.is_ptr() or divided):
            return broadcast_others(self, left, right)
        return check(self, left, right, left_pointer, right_pointer, arithmetic, divided)

    semantic.cast, semantic.broadcast_impl_value = cast_others, broadcast_others
    semantic.binary_op_type_checking_impl = check_others
