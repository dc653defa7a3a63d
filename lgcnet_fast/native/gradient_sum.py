"""Launcher of csrc/gradient_sum.cuh: the gradient of a map that several operations read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lgcnet_fast.native import instances
from lgcnet_fast.native.launcher import Launcher, check_grid
from lgcnet_fast.native.loader import load
from lgcnet_fast.native.operands import STORAGE, check_dense_maps, empty_map, pack

MOST_GRADIENTS = 16
THREADS = 256
VECTORS = 4
"""kMostGradients, kGradientThreads and kGradientVectors of the kernel."""

ARGUMENTS = np.dtype(
    [
        ("gradients", "u8", (MOST_GRADIENTS,)),
        *[(name, "u8") for name in ("x", "dx")],
        ("size", "i8"),
        *[(name, "i4") for name in ("count", "relu")],
    ],
    align=True,
)


def gradient_sum(
    gradients: Sequence[Tensor],
    x: Tensor,
    relu: bool,
    *,
    out: Tensor | None = None,
    launcher: Launcher | None = None,
) -> Tensor:
    """The gradient of x, like it: dense NHWC (N, C, H, W), as is every gradient.

    gradients: 1 to 16, of x or, with `relu`, of relu(x); out: where their sum goes. Added in
    float32 and rounded once. Raises `ValueError` for arguments that do not fit, `DeviceError`
    without a route.
    """
    launcher = launcher or load()
    dx = empty_map(tuple(x.shape), x) if out is None else out
    for name, maps in (("x", [x]), ("gradients", gradients), ("out", [dx])):
        check_dense_maps(name, maps, x, launcher)
    if not 1 <= len(gradients) <= MOST_GRADIENTS:
        raise ValueError(f"gradients: {len(gradients)} given, need 1 to {MOST_GRADIENTS}")
    wide, _, single = instances.vectors(STORAGE[x.dtype])
    addresses = [one.data_ptr() for one in (*gradients, x, dx)]
    aligned = x.numel() % wide == 0 and all(address % 16 == 0 for address in addresses)
    vector = wide if aligned else single
    grid = (-(-x.numel() // (THREADS * VECTORS * vector)), 1, 1)
    check_grid("gradient_sum", grid)
    *of_gradients, of_x, of_dx = addresses
    of_gradients += [0] * (MOST_GRADIENTS - len(of_gradients))
    arguments = pack(ARGUMENTS, (of_gradients, of_x, of_dx, x.numel(), len(gradients), int(relu)))
    instance = instances.gradient_sum(STORAGE[x.dtype], vector)
    launcher.launch(instance, grid, (THREADS, 1, 1), arguments, x.device)
    return dx
