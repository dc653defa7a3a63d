"""Stacks of weights from one launch against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.weight_stacks import BLOCK, WeightStacks

CPU = not torch.cuda.is_available()
DTYPES = [
    torch.float32,
    torch.float16,
    # The interpreter truncates where a GPU rounds.
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(CPU, reason="needs a GPU's rounding")),
]


def weights(device: torch.device, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Odd and even numbers of channels, weights of several programs, parts of a tensor."""
    torch.manual_seed(0)
    part = torch.randn(4 * 9 + 1, device=device, dtype=dtype)[1:].view(4, 1, 3, 3)
    shapes = [(3, (3, 1, 3, 3)), (3, (5, 3, 1, 1)), (1, (1, 1, 3, 3)), (2, (1, 1, 1, 1))]
    shapes += [(2, (48, 64, 1, 1)), (1, (48, 1, 3, 3)), (1, (256, 1, 3, 3))]
    stacks = [
        [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
        for count, shape in shapes
    ]
    assert any(weight.numel() > BLOCK for stack in stacks for weight in stack)
    like_maps = stacks[1][0].clone(memory_format=torch.channels_last)
    return [*stacks, [part], [like_maps]]


def by_torch(stack: list[Tensor], dtype: torch.dtype) -> Tensor:
    if stack[0].shape[2:] == (3, 3):
        return torch.stack([weight[:, 0].permute(1, 2, 0) for weight in stack])
    return torch.stack([weight[:, :, 0, 0] for weight in stack]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    given = weights(device)
    for stack, found in zip(given, WeightStacks(given).filled(dtype), strict=True):
        wanted = by_torch(stack, dtype)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0


def test_weights_of_other_dtypes(device: torch.device) -> None:
    for dtype in (torch.float64, torch.float16):
        given = weights(device, dtype)
        for stack, found in zip(given, WeightStacks(given).filled(dtype), strict=True):
            assert found.dtype == dtype and torch.equal(found, by_torch(stack, dtype))


def test_values_of_the_moment(device: torch.device) -> None:
    given = weights(device)
    stacks = WeightStacks(given)
    before = [stack.clone() for stack in stacks.filled(torch.float32)]
    for weight in (weight for stack in given for weight in stack):
        weight.mul_(2)
    for earlier, now in zip(before, stacks.filled(torch.float32), strict=True):
        assert torch.equal(2 * earlier, now)
