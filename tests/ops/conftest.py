"""The kernels run compiled on a CUDA GPU and interpreted elsewhere."""

import os

import pytest
import torch

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 PyTorch's own convolutions round no operands to 19 bits on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def repeatable_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of PyTorch's own are the same on every run: cuDNN's in float64 need not be."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
