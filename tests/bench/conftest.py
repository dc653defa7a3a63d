"""Dry runs of the measurements: Triton's interpreter stands in for a GPU."""

import os

import torch

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
