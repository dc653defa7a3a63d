"""Triton kernels of the engine and their launchers: plain functions of tensors, no autograd.

Every kernel reads and writes dense NHWC maps: tensors of logical shape (N, C, H, W) in
channels_last memory. Importing this package does not import triton; its modules do.
"""

if __name__ != "lgcnet_fast.kernels":
    raise ImportError(
        "these kernels are imported as lgcnet_fast.kernels; a top-level 'kernels' would shadow "
        "other packages of that name"
    )
