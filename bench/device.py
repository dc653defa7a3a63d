"""Where measurements run: the first GPU; without one the CPU, which serves dry runs only."""

from __future__ import annotations

import gc

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
if not CUDA:
    torch.set_num_threads(1)  # Dry runs are tiny; waiting threads would only disturb each other.
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def require_gpu(dry: bool) -> None:
    """Exits where times would mean nothing."""
    if not (CUDA or dry):
        raise SystemExit("no CUDA GPU here; a dry run on tiny shapes works on the CPU")


def use_fastest_convolutions(algorithms: int = 10) -> None:
    """cuDNN tries so many of its algorithms; float32 means float32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = algorithms
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def release_memory() -> None:
    """Gives back what the last measurement held."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
