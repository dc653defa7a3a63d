"""The choice between the implementations of an operation: triton, cuda or reference.

An operation has a plain-PyTorch reference, which runs everywhere, and may have a Triton and a CUDA
form. A named backend serves or raises `BackendError` with the reason. `auto` takes what the tuning
table of the device names (see tuning.py), the reference for CPU tensors, and where it has to fall
back to the reference on a GPU it warns once for each reason, or raises if `strict`. What
torch.compile and torch.export trace is always the reference: a compiler fuses the plain form by
itself, and exported files hold standard operations only.

    >>> from lgcnet_fast import ops
    >>> with ops.use_backend("reference"):
    ...     y = ops.upsample(torch.rand(1, 3, 5, 5), (9, 9))
    >>> ops.explain("upsample", torch.rand(1, 3, 5, 5), (9, 9))["reference"]
    'serves'
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops import tuning
from lgcnet_fast.ops.availability import why_not

BACKENDS = ("triton", "cuda", "reference")
SERVES = "serves"


class Choice(NamedTuple):
    name: str
    """auto or one of `BACKENDS`."""
    strict: bool
    """Whether falling back to the reference is an error."""


_process_wide = Choice("auto", strict=False)
_here: ContextVar[Choice | None] = ContextVar("backend", default=None)
_supposed: ContextVar[torch.device | None] = ContextVar("supposed_device", default=None)


def set_backend(name: str, strict: bool = False) -> None:
    """The backend of the whole process, outside `use_backend`. Raises `BackendError`."""
    global _process_wide
    _process_wide = _choice(name, strict)


@contextmanager
def use_backend(name: str, strict: bool = False) -> Iterator[None]:
    """The backend inside the `with` block, in this thread. Raises `BackendError`."""
    token = _here.set(_choice(name, strict))
    try:
        yield
    finally:
        _here.reset(token)


@contextmanager
def suppose(device: torch.device) -> Iterator[None]:
    """Inside the `with` block operations choose as for tensors on `device`, which need not exist.

    For tensors without data, on which every implementation says what it would allocate.
    """
    token = _supposed.set(device)
    try:
        yield
    finally:
        _supposed.reset(token)


def supposing() -> bool:
    """Whether tensors have no data: inside `suppose`."""
    return _supposed.get() is not None


def current_backend() -> Choice:
    return _here.get() or _process_wide


def check_backend(name: str, device: torch.device, strict: bool = False) -> None:
    """Raises `BackendError` where no operation could run with this choice on `device`."""
    _choice(name, strict)
    reason = None if name == "auto" else why_not(name, device)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot serve here: {reason}; auto always can")
    if strict and device.type == "cuda" and tuning.table_of(device) is None:
        raise BackendError(
            "strict_backend cannot hold here: there is no tuning table for this GPU; make one with "
            f"{tuning.REMEDY}, name a backend, or set strict_backend = false"
        )


def explain(operation_name: str, *arguments: Any) -> dict[str, str]:
    """Each backend's verdict on an operation with these arguments: `serves`, or why it cannot.

    The entry `auto` names the backend that `auto` takes, with the reason where it falls back.
    Nothing is computed. Raises `BackendError` for an unknown operation.
    """
    if operation_name not in _operations:
        known = ", ".join(sorted(_operations))
        raise BackendError(f"unknown operation {operation_name!r}; there are: {known}")
    operation = _operations[operation_name]
    verdicts = {name: operation.refusal(name, arguments) or SERVES for name in BACKENDS}
    name, reason = operation.automatic(arguments)
    return verdicts | {"auto": f"{name}: {reason}" if reason else name}


@dataclass(frozen=True)
class Implementation:
    """`run` computes; `refuse`, of the same arguments, says why it cannot, or gives None.

    Missing libraries and unfit devices are refused beforehand (`why_not`), so that `refuse` only
    speaks of dtypes, layouts and shapes. Both import kernels inside.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None]


class Operation:
    """An operation under its name: calling it runs the implementation that is chosen.

    Arguments are positional, the tensors on one device; whoever calls has checked them.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        triton: Implementation | None = None,
        cuda: Implementation | None = None,
        tuned_as: str | None = None,
    ) -> None:
        """tuned_as: the operation whose entry in tuning tables counts for this one too."""
        self.name = name
        self.tuned_as = tuned_as or name
        self._implementations = {
            "triton": triton,
            "cuda": cuda,
            "reference": Implementation(reference, lambda *arguments: None),
        }
        _operations[name] = self

    def __call__(self, *arguments: Any) -> Any:
        traced = torch.compiler.is_compiling()
        implementation = self._implementations["reference" if traced else self.backend(arguments)]
        assert implementation is not None
        return implementation.run(*arguments)

    def backend(self, arguments: tuple[Any, ...]) -> str:
        """The backend that runs these arguments. Raises `BackendError`, or warns once."""
        name, strict = current_backend()
        if _device_of(arguments).type == "meta":
            return "reference"  # Only shapes are wanted, wherever the others will run.
        if name == "auto":
            name, reason = self.automatic(arguments)
            if reason is not None:
                _fall_back(reason, strict)
        elif name != "reference":
            reason = self.refusal(name, arguments)
            if reason is not None:
                raise BackendError(f"backend {name!r} cannot serve {self.name}: {reason}")
        return name

    def refusal(self, backend: str, arguments: tuple[Any, ...]) -> str | None:
        """Why a backend cannot serve these arguments; None if it can."""
        implementation = self._implementations[backend]
        if implementation is None:
            return f"{self.name} has no {backend} form"
        absent = None if _supposed.get() else why_not(backend, _device_of(arguments))
        return absent or implementation.refuse(*arguments)

    def automatic(self, arguments: tuple[Any, ...]) -> tuple[str, str | None]:
        """What `auto` takes, and the reason where that is a fallback."""
        device = _supposed.get() or _device_of(arguments)
        if device.type != "cuda":
            return "reference", None
        name, reason = tuning.backend_for(self.tuned_as, device)
        if name != "reference":
            refusal = self.refusal(name, arguments)
            if refusal is not None:
                return "reference", f"backend {name!r} cannot serve {self.name}: {refusal}"
        return name, reason


_operations: dict[str, Operation] = {}


def _choice(name: str, strict: bool) -> Choice:
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; write auto, {', '.join(BACKENDS)}")
    return Choice(name, strict)


def _device_of(arguments: Iterable[Any]) -> torch.device:
    """That of the first tensor, in lists too."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0].device
    return torch.device("cpu")


def _fall_back(reason: str, strict: bool) -> None:
    if strict:
        raise BackendError(f"{reason} (strict_backend forbids falling back to the reference)")
    _warn_once(f"{reason}; the plain reference runs instead")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
