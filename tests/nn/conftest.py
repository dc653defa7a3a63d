"""Triton kernels run compiled on a CUDA GPU, and interpreted on the CPU elsewhere."""

import os

import pytest
import torch

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
