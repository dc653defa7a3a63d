"""The same tests run compiled on a CUDA GPU and interpreted elsewhere."""

import os
from collections.abc import Generator, Iterator

import pytest
import torch

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

CANARIES = 64
PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, object]:
    """What fixtures ask when a test is over: whether it has passed."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """What launchers allocate holds NaN, and lies between canaries that must survive the test.

    Whole numbers hold 255, which no kernel writes.
    """
    buffers = []

    def new_empty(like, *shape, dtype=None, **options):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        size = shape.numel()
        dtype = dtype or like.dtype
        poison = torch.nan if dtype.is_floating_point else 255
        buffer = torch.full((size + 2 * CANARIES,), poison, dtype=dtype, device=like.device)
        buffers.append((buffer, buffer[:CANARIES].clone()))
        return buffer[CANARIES : CANARIES + size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    # One that fails or skips itself may not have come so far.
    assert buffers or not request.node.stash.get(PASSED), "nothing was allocated under guard"
    for buffer, canaries in buffers:
        for end in (buffer[:CANARIES], buffer[-CANARIES:]):
            assert torch.allclose(end, canaries, equal_nan=True)
