"""A whole supernet on the CUDA backend, its kernels emulated, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast import ops
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.space.sampling import gumbel_softmax

CLASSES = 3


def results(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a small supernet in NHWC memory: loss, all gradients, all buffers, each as a vector."""
    torch.manual_seed(0)
    space = make_space({"cells": 4, "reductions": [1, 2], "widths": [4, 8, 8]})
    sample = gumbel_softmax(space.build_arch()(), 1.0, torch.Generator(), space.arch_groups())
    z = {name: rows.detach().to(dtype).requires_grad_() for name, rows in sample.items()}
    supernet = space.build_supernet(CLASSES).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 65, 81).to(dtype, memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (2, 65, 81))
    with ops.use_backend(backend):
        loss = ops.upsample_cross_entropy(supernet(x, z), target)
        loss.backward()
    found = {
        "loss": [loss.detach()],
        "gradients of Z": [rows.grad for rows in z.values()],
        "gradients of weights": [weight.grad for weight in supernet.parameters()],
        "running statistics": list(supernet.buffers()),
    }
    return {name: torch.cat([one.double().flatten() for one in found[name]]) for name in found}


@pytest.mark.usefixtures("cuda_backend")
def test_as_close_to_float64_as_the_reference() -> None:
    exact = results("reference", torch.float64)
    ours, reference = (results(name, torch.float32) for name in ("cuda", "reference"))
    for name, truth in exact.items():
        errors = [(one[name] - truth).norm() / truth.norm() for one in (ours, reference)]
        assert errors[0] < 4 * errors[1] + 1e-6, f"{name}: {errors}"
