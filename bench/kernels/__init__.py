"""Single operations against PyTorch and against the floor of bytes."""

import os

import torch

# Triton reads this when it is first imported: without a GPU its interpreter serves dry runs.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
