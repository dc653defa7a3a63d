"""The sum of gradients that meet at a map, on every route that this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast.native.gradient_sum import MOST_GRADIENTS, gradient_sum
from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.operands import STORAGE
from lgcnet_fast.ops.concat_pair import concatenated, taken_apart
from lgcnet_fast.ops.fan_out import gradient_sum as operation
from tests.native.truth import nhwc, poisoned, poisoned_memory

SHAPES = [(2, 8, 9, 13), (1, 3, 5, 3), (1, 17, 1, 1), (2, 16, 16, 33)]


def some(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [nhwc(torch.randn(shape, generator=generator).to(dtype)) for _ in range(count)]


def wanted(gradients: list[Tensor], x: Tensor, relu: bool) -> Tensor:
    total = torch.zeros_like(x, dtype=torch.float32)
    for one in gradients:
        total += one.float()
    if relu:
        total = torch.ops.aten.threshold_backward(total, x.float(), 0)
    return total.to(x.dtype)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("count", [1, 3, MOST_GRADIENTS])
def test_sum_is_rounded_once(
    launcher: Launcher,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    relu: bool,
    count: int,
) -> None:
    x, *gradients = some(1 + count, shape, dtype)
    x.movedim(1, -1).view(-1)[:3] = torch.tensor([0.0, -0.0, float("nan")])
    there = [one.to(device) for one in (x, *gradients)]
    with poisoned_memory():
        found = gradient_sum(there[1:], there[0], relu, launcher=launcher)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        found.cpu(), wanted(gradients, x, relu), rtol=0, atol=0, equal_nan=True
    )


def test_addresses_that_are_no_multiples_of_a_vector(
    launcher: Launcher, device: torch.device
) -> None:
    x, *gradients = some(4, (1, 4, 3, 5), torch.float16)
    memory = torch.full((5, 62), float("nan"), dtype=torch.float16, device=device)
    maps = [row[1:61].view(1, 3, 5, 4).movedim(-1, 1) for row in memory]
    for place, one in zip(maps, (x, *gradients), strict=False):
        place.copy_(one)
    found = gradient_sum(maps[1:4], maps[0], True, out=maps[4], launcher=launcher)
    assert found is maps[4] and memory[:, [0, 61]].isnan().all()
    torch.testing.assert_close(found.cpu(), wanted(gradients, x, True), rtol=0, atol=0)


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_operations_take_it(count: int, relu: bool) -> None:
    first, second = some(2, (2, 3, 5, 7), torch.float16)
    y = concatenated(first, second, relu, "cuda")
    gradients = some(count, tuple(y.shape), torch.float16)
    total = wanted(gradients, y, relu)
    assert torch.equal(operation(gradients, y, relu, "cuda"), total)
    halves = taken_apart(gradients, y, relu, "cuda")
    for found, part in zip(halves, total.chunk(2, dim=1), strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last) and torch.equal(found, part)
    torch.library.opcheck(operation, (gradients, y, relu, "cuda"))


def test_bad_arguments_are_named(emulated: Launcher) -> None:
    x, g = some(2, (2, 4, 3, 5), torch.float32)
    bad = {
        "gradients: 0 given": ([], x),
        "gradients: 17 given": ([g] * 17, x),
        r"gradients\[1\]: shape": ([g, g[:, :, 1:]], x),
        r"gradients\[0\]: dtype": ([g.half()], x),
        r"gradients\[0\]: strides": ([poisoned((2, 4, 3, 5), torch.float32, g.device)], x),
        r"x\[0\]: dtype torch.float64": ([g], x.double()),
    }
    for message, (gradients, of) in bad.items():
        with pytest.raises(ValueError, match=message):
            gradient_sum(gradients, of, False, launcher=emulated)
