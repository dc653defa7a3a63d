"""The stem by its kernels against plain modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lgcnet_fast.nn.stem import Stem
from lgcnet_fast.ops import use_backend


class Results(TorchDispatchMode):
    """Names of operations, and shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.names.append(operation.name())
        self.shapes.update(t.shape for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


def stem_and_image(device: torch.device) -> tuple[Stem, Tensor]:
    torch.manual_seed(0)
    return Stem([8, 16, 4], [2, 2, 1]).to(device), torch.randn(2, 3, 9, 14, device=device)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_copies_the_image(training: bool, device: torch.device) -> None:
    stem, image = stem_and_image(device)
    stem.train(training)
    autocast = torch.autocast(device.type, torch.bfloat16)
    with Results() as results, use_backend("triton"), autocast:
        maps = stem(image)
    sum(y.float().sum() for y in maps).backward()
    assert results.names.count("lgcnet_fast::image_convolution") == 1
    assert image.shape not in results.shapes


def test_gradients(device: torch.device) -> None:
    stem, image = stem_and_image(device)
    found = {}
    for backend in ("triton", "reference"):
        with use_backend(backend):
            maps = stem(image)
        found[backend] = [
            *maps,
            *torch.autograd.grad(sum(y.square().sum() for y in maps), list(stem.parameters())),
        ]
    for fused, plain in zip(*found.values(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
