"""CUDA C++ kernels (the folder csrc) and their launchers: plain functions of tensors, no autograd.

They run on every GPU since sm_60 and need neither Triton nor tensor cores. Two routes lead to the
same sources: an extension compiled at install, or CuPy, which compiles at run time. Tensors have
the logical shape (N, C, H, W) and lie in memory as NHWC; slices of channels are welcome.

Importing this package starts neither CUDA nor CuPy.
"""
