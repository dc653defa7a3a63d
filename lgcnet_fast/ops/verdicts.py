"""What each backend can do on the devices of this machine, for `lgcnet doctor`."""

from __future__ import annotations

import torch

from lgcnet_fast.doctor import Finding
from lgcnet_fast.native.hopper import route_refusal
from lgcnet_fast.ops.availability import why_not
from lgcnet_fast.ops.backend import BACKENDS, SERVES
from lgcnet_fast.ops.tuning import REMEDY, table_of


def backend_findings() -> list[Finding]:
    """A line for each backend and GPU; without a GPU one for each backend."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        cpu = torch.device("cpu")
        return [Finding(f"backend {name}", "ok", why_not(name, cpu) or SERVES) for name in BACKENDS]
    gpus = [torch.device("cuda", index) for index in range(count)]
    return [
        finding for gpu in gpus for finding in (*_named(gpu), _automatic(gpu), *_of_hopper(gpu))
    ]


def _named(gpu: torch.device) -> list[Finding]:
    reasons = {name: why_not(name, gpu) for name in BACKENDS}
    return [
        Finding(f"backend {name} on {gpu}", "warn" if reason else "ok", reason or SERVES)
        for name, reason in reasons.items()
    ]


def _of_hopper(gpu: torch.device) -> list[Finding]:
    """Whether `triton` has what the extension adds to it on sm_90."""
    if torch.cuda.get_device_capability(gpu) != (9, 0):
        return []
    reason = route_refusal()
    remedy = "install again where there is an nvcc, see docs/native.md" if reason else ""
    detail = reason or "gradients of depthwise branches and of 3x3 convolutions' weights"
    return [Finding(f"sm_90 kernels on {gpu}", "warn" if reason else "ok", detail, remedy)]


def _automatic(gpu: torch.device) -> Finding:
    title, table = f"backend auto on {gpu}", table_of(gpu)
    if table is None:
        return Finding(title, "warn", "no tuning table for this GPU: reference", REMEDY)
    named = sorted(table.backends.items())
    return Finding(title, "ok", ", ".join(f"{operation}: {name}" for operation, name in named))
