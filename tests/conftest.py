"""What older Tritons cannot interpret is skipped with the reason; on a GPU nothing is.

Also fixtures that tests of several folders share.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from tests.interpreter import patch

# Two workers of two threads each wait for one another on two cores, ten times as long as one
# thread works on maps as small as these. The variable is for commands that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

GAPS = ("'InterpreterBuilder' object has no attribute", "Unsupported lhs dtype fp64")
"""Of the interpreter of Triton 3.3, that of torch 2.7: it misses operations of one bit, and
products in float64. Compiled kernels have both."""


def has_gaps() -> bool:
    try:
        return version("triton").startswith("3.3.")
    except PackageNotFoundError:
        return False


def gap_of(error: BaseException | None) -> str | None:
    """The gap that an error, or what it came from, is about."""
    while error is not None:
        for gap in GAPS:
            if gap in str(error).replace("\\", ""):
                return gap
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    try:
        return (yield)
    except Exception as error:
        gap = gap_of(error) if has_gaps() else None
        if gap is None:
            raise
        pytest.skip(f"the interpreter of Triton 3.3: {gap}")


def pytest_collection_finish() -> None:
    """What is there before the first test stays: no collection of garbage looks through it again.

    Measurements collect garbage around each of their hundreds of entries.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        with suppress(ImportError, AttributeError):
            patch(importlib.import_module("triton.runtime.interpreter"))


@pytest.fixture(autouse=True)
def backend_of_each_test() -> Iterator[None]:
    """Runs and measurements set the backend of the whole process."""
    yield
    if "lgcnet_fast.ops.backend" in sys.modules:
        sys.modules["lgcnet_fast.ops.backend"].set_backend("auto")


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Products on a GPU are those of float32: cuDNN rounds factors to TF32 unless told not to."""
    modules = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    yield
    for module, allowed in zip(modules, before, strict=True):
        module.allow_tf32 = allowed
