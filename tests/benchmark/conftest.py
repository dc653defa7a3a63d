"""Triton kernels run compiled on a CUDA GPU, and interpreted on the CPU elsewhere."""

import os

import torch

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
