"""The concatenation of two maps, its ReLU and their gradients against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels import concat_pair
from lgcnet_fast.kernels.concat_pair import concat_pair_backward, concat_pair_forward

CUDA = torch.cuda.is_available()
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 8, 3, 1), (2, 24, 4, 9), (1, 17, 7, 11)]
if CUDA:
    SHAPES += [(16, 32, 64, 128), (16, 128, 16, 32), (2, 48, 49, 97), (3, 255, 23, 30)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def map_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Some of its values are 0, of either sign, infinite and NaN."""
    images, channels, height, width = shape
    values = torch.randn(images, height, width, channels, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    values.view(-1)[1::7] = special.repeat(values.numel())[: values.view(-1)[1::7].numel()]
    return values.to(device, dtype).movedim(-1, 1)


def gradients_of(count: int, y: Tensor) -> list[Tensor]:
    values = [torch.randn(y.movedim(1, -1).shape, dtype=torch.float64) for _ in range(count)]
    return [value.to(y.device, y.dtype).movedim(-1, 1) for value in values]


def truth(pair: list[Tensor], relu: bool) -> Tensor:
    y = torch.cat([x.double() for x in pair], dim=1)
    return torch.relu(y) if relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_float64(shape, dtype, relu, device, guarded):
    torch.manual_seed(0)
    pair = [map_of(shape, dtype, device) for _ in range(2)]
    y = concat_pair_forward(*pair, relu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), truth(pair, relu), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_equals_float64(shape, dtype, relu, count, device, guarded):
    torch.manual_seed(0)
    pair = [map_of(shape, dtype, device) for _ in range(2)]
    y = truth(pair, relu).to(dtype).contiguous(memory_format=torch.channels_last)
    gradients = gradients_of(count, y)
    found = concat_pair_backward(gradients, y, relu)
    total = torch.stack(gradients).double().sum(0)
    if relu:
        total = torch.ops.aten.threshold_backward(total, y.double(), 0)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    # Rounded once (the interpreter cuts bfloat16 off); what cancels is as exact as the accumulator.
    bound = torch.finfo(dtype).eps * total.abs()
    bound += count * torch.finfo(accumulated).eps * torch.stack(gradients).double().abs().sum(0)
    for half, wanted, allowed in zip(
        found, total.chunk(2, dim=1), bound.chunk(2, dim=1), strict=True
    ):
        assert half.dtype == dtype and half.is_contiguous(memory_format=torch.channels_last)
        assert ((half.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 16, 3, 5)], ids=str)
def test_wide_indices(shape, device, monkeypatch):
    """As for maps that have more vectors than 32 bits count."""
    pair = [map_of(shape, torch.float32, device) for _ in range(2)]
    found = []
    for largest in (concat_pair.LARGEST_INDEX, 0):
        monkeypatch.setattr(concat_pair, "LARGEST_INDEX", largest)
        y = concat_pair_forward(*pair, relu=True)
        found.append([y, *concat_pair_backward([y, y], y, relu=True)])
    torch.testing.assert_close(*found, atol=0, rtol=0, equal_nan=True)


def test_same_inputs_same_bits(device):
    shape = (16, 64, 32, 64) if CUDA else (2, 16, 3, 5)
    pair = [map_of(shape, torch.bfloat16, device) for _ in range(2)]
    found = []
    for _ in range(2):
        y = concat_pair_forward(*pair, relu=True)
        torch.manual_seed(0)
        found.append([y, *concat_pair_backward(gradients_of(3, y), y, relu=True)])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))


def test_bad_arguments_are_named(device):
    x = map_of((1, 4, 3, 5), torch.float32, device)
    with pytest.raises(ValueError, match=r"maps\[1\]: strides .* channels_last"):
        concat_pair_forward(x, x.contiguous(), relu=True)
    with pytest.raises(ValueError, match=r"maps\[1\]: dtype"):
        concat_pair_forward(x, x.double(), relu=True)
    with pytest.raises(ValueError, match=r"maps\[1\]: shape"):
        concat_pair_forward(x, map_of((1, 5, 3, 5), torch.float32, device), relu=False)
    with pytest.raises(ValueError, match=r"gradients\[0\]: shape"):
        concat_pair_backward([x], map_of((1, 8, 3, 5), torch.float32, device), relu=True)
    odd = map_of((1, 3, 3, 5), torch.float32, device)
    with pytest.raises(ValueError, match="even number of channels"):
        concat_pair_backward([odd], odd, relu=False)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    shape = (3, 4096, 2816, 32)
    pair = [torch.randn(shape, device=device, dtype=torch.bfloat16).movedim(-1, 1) for _ in "ab"]
    y = concat_pair_forward(*pair, relu=True)
    assert y.numel() > 2**31
    last = concat_pair_forward(*(x[2:] for x in pair), relu=True)
    assert torch.equal(y[2:], last)
    halves = concat_pair_backward([y, y], y, relu=True)
    parts = concat_pair_backward([last, last], last, relu=True)
    assert all(torch.equal(half[2:], part) for half, part in zip(halves, parts, strict=True))
