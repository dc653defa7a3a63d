"""The key under which Triton finds a compiled kernel on disk, the same in every process.

Triton makes it of a kernel's source, of the functions that this calls, and of the constants that
they read. But constants of functions are left out whose own keys have not been asked for before
(seen in Triton 3.6 and 3.7), so that it depends on what a process has launched earlier. Kernels
that other processes had compiled ahead were not found then: 45 of a step of the search were
compiled once more, one after another (bench/results/compiled_twice_h200.json).
"""

from __future__ import annotations

from typing import Any


def settle_key(function: Any) -> None:
    """Fixes the key of a jitted function, after those of all functions that it calls.

    Must come before Triton asks for it: before a launch, `warmup` or `preload`.
    """
    for name in function.fn.__code__.co_names:
        called = function.fn.__globals__.get(name)
        if isinstance(called, type(function)) and called is not function:
            settle_key(called)
    function.cache_key  # noqa: B018  a property that keeps what it has found
