"""Operations forward and backward, at the maps of the search's crops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.device import CUDA
from bench.kernels.operation_cases import OperationCase, cases
from bench.kernels.operations import comparison
from lgcnet_fast.ops.backend import use_backend

SIZE = (256, 512) if CUDA else None
ROUNDS = 15
CASES = [case for dtype in (torch.bfloat16, torch.float32) for case in cases(SIZE, dtype)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation} {case}")
def test_operation(case: OperationCase, backend: str, guard: Any, bandwidth: float) -> None:
    with use_backend(backend, strict=True):
        found = comparison(case)
        found.verify()
        times = found.times(rounds=ROUNDS)
    guard(
        f"{backend} {case.operation} {case}",
        times,
        floor_s=case.bytes / bandwidth if CUDA else None,
        bytes=case.bytes,
        flops=case.flops,
    )
