"""How kernels are launched: where the GPU allows it, before the launch in front of them has ended.

On sm_90 and later a launch may be programmatic: its blocks are set up while the last ones of the
launch before drain and its writes become visible, and wait where the kernel says so. A step of the
search on an H200 took 14.69 ms instead of 14.85. No kernel lets the next one in earlier still
(griddepcontrol.launch_dependents): blocks that wait then take room from those that work, and the
step took 15.13 ms.

A kernel waits for the launch before only. That this one is complete says nothing of those before
it, unless it has waited for its own. So every kernel waits, on every path, before it reads or
writes anything: functions that are launched are made by `kernel`, not by `triton.jit`, and begin
with `wait_for_predecessor`. Launches that are not programmatic start when all is complete that was
launched before, and need no wait: those of libraries, and of the kernels of engines (infer_*.py,
upsample_argmax.py), whose graphs change afterwards (deploy/graph_pointers.py), which has not been
tried with launches of this kind.

Before its first launch the key of a kernel is settled (see cache_keys.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import triton
import triton.language as tl
from triton.runtime import driver

from lgcnet_fast.kernels.cache_keys import settle_key

try:
    from triton.language.target_info import cuda_capability_geq

    _TELLS_TARGET = True
except ImportError:  # Triton before 3.5
    _TELLS_TARGET = False

    @tl.core.builtin
    def cuda_capability_geq(major, minor, **_):
        return tl.constexpr(False)


@triton.jit
def wait_for_predecessor():
    """The first statement of every kernel: until the launch before is complete, and all it wrote.

    Costs nothing in a launch that is not programmatic.
    """
    if _PROGRAMMATIC and cuda_capability_geq(9, 0):
        # An operand there must be; as in Triton's own, it stands in a comment.
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


INTERPRETED = not isinstance(wait_for_predecessor, triton.JITFunction)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at the first import)."""
_PROGRAMMATIC = tl.constexpr(_TELLS_TARGET and not INTERPRETED)
"""Wherever the GPU allows it."""


def kernel(
    function: Callable[..., Any] | None = None, *, programmatic: bool = True, **options: Any
) -> Any:
    """Decorates a function that is launched: `triton.jit`, whose options it takes.

    programmatic: it begins with `wait_for_predecessor`, so that its launches may be programmatic.
    """
    if function is None:
        return partial(kernel, programmatic=programmatic, **options)
    jitted: Any = triton.jit(function, **options)
    if INTERPRETED:
        return jitted
    settled = False

    def run(*arguments: Any, **launch: Any) -> Any:
        nonlocal settled
        if not settled:
            settle_key(jitted)
            settled = True
        if programmatic and _PROGRAMMATIC and _allows(driver.active.get_current_device()):
            launch["launch_pdl"] = True
        return type(jitted).run(jitted, *arguments, **launch)

    jitted.run = run  # Which jitted[grid] and jitted.warmup call.
    return jitted


@cache
def _allows(device: int) -> bool:
    """Whether kernels for the current device, which has this number, wait."""
    return bool(cuda_capability_geq(9, 0))
