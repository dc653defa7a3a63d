"""The same tests run compiled on a CUDA GPU and interpreted elsewhere."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

CANARIES = 64


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
    assert buffers, "nothing was allocated under guard"
    for buffer, canaries in buffers:
        for end in (buffer[:CANARIES], buffer[-CANARIES:]):
            assert torch.allclose(end, canaries, equal_nan=True)
