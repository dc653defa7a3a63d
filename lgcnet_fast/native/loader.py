"""Finds the route to the kernels: the prebuilt extension, else compilation at run time."""

from __future__ import annotations

from functools import cache

import torch

from lgcnet_fast.errors import DeviceError
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.prebuilt import Prebuilt
from lgcnet_fast.native.run_time import RunTime

ROUTES: tuple[type[Launcher], ...] = (Prebuilt, RunTime)


def available() -> dict[str, str | None]:
    """Each route's name and why it cannot serve here; None if it can."""
    return {route.route: attempt(route)[1] for route in ROUTES}


def load() -> Launcher:
    """The first route that works. Raises `DeviceError` with the reasons of all if none does."""
    reasons = []
    for route in ROUTES:
        launcher, reason = attempt(route)
        if launcher is not None:
            return launcher
        reasons.append(f"{route.route}: {reason}")
    raise DeviceError("the CUDA kernels cannot run here:\n  " + "\n  ".join(reasons))


@cache
def attempt(route: type[Launcher]) -> tuple[Launcher | None, str | None]:
    """A launcher, or the reason why there is none."""
    if not torch.cuda.is_available():
        return None, f"torch {torch.__version__} finds no CUDA GPU"
    try:
        return route(), None
    except DeviceError as error:
        return None, str(error)
