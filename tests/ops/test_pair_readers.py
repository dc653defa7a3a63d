"""Two maps whose concatenation several operations read: gradients as by autograd, one map kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.ops import pair_readers, use_backend
from lgcnet_fast.ops.concat_pair import (
    _concatenated,
    _taken_apart,
    concatenated,
    taken_apart,
)
from lgcnet_fast.ops.fan_out import AT_ONCE
from lgcnet_fast.ops.pair_readers import RectifiedPair

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (2, 8, 3, 1)]


def pair_of(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    images, channels, height, width = shape
    return [
        torch.randn(images, height, width, channels, dtype=dtype, device=device)
        .movedim(-1, 1)
        .requires_grad_()
        for _ in range(2)
    ]


@pytest.mark.parametrize("count", [1, 2, 2 * AT_ONCE + 1])
@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_only_rectified(
    shape: tuple[int, ...], backend: str, nhwc: bool, count: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    pair = pair_of(shape, device)
    inputs = pair if nhwc else [x.contiguous() for x in pair]
    weights = torch.randn(count, dtype=torch.float64, device=device)
    with use_backend(backend):
        source = pair_readers(*inputs, only_rectified=True)
        terms = [source.rectified(weight.mul).square() for weight in weights]
    value = F.relu(torch.cat(pair, dim=1))
    wanted = [(weight * value).square() for weight in weights]
    torch.testing.assert_close(terms, wanted)
    found = torch.autograd.grad(sum(terms).sum(), pair)
    torch.testing.assert_close(found, torch.autograd.grad(sum(wanted).sum(), pair))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_also_plain(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    pair = pair_of((2, 3, 5, 7), device)
    with use_backend(backend):
        source = pair_readers(*pair)
        out = source.plain().square() + source.rectified(torch.exp) + source.plain()
    value = torch.cat(pair, dim=1)
    wanted = value.square() + F.relu(value).exp() + value
    torch.testing.assert_close(out, wanted)
    found = torch.autograd.grad(out.sum(), pair)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), pair))


@pytest.mark.parametrize("fake", [False, True])
def test_only_the_rectified_map_is_kept(fake: bool, device: torch.device) -> None:
    with FakeTensorMode() if fake else torch.enable_grad():
        pair = pair_of((2, 3, 5, 7), device)
        copies = [x.clone() for x in pair]
        storages = [weakref.ref(copy.untyped_storage()) for copy in copies]
        with use_backend("triton"):
            source = pair_readers(*copies, only_rectified=True)
        out = source.rectified(torch.square) + source.rectified(torch.square)
        del copies
        gc.collect()
        assert [storage() for storage in storages] == [None, None]
        assert out.is_contiguous(memory_format=torch.channels_last)
        gradients = torch.autograd.grad(out.sum(), pair)
        assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients)
        assert all(g.shape == x.shape for g, x in zip(gradients, pair, strict=True))


def test_one_half_without_gradient(device: torch.device) -> None:
    first, second = pair_of((2, 3, 5, 7), device)
    with use_backend("triton"):
        out = pair_readers(first, second.detach(), only_rectified=True).rectified(torch.square)
    (found,) = torch.autograd.grad(out.sum(), first)
    torch.testing.assert_close(found, 2 * F.relu(first))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_forms_agree_and_round_once(count: int, relu: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    pair = [x.detach() for x in pair_of((2, 3, 5, 7), device, torch.float16)]
    pair[0][0, 0, 0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    y = concatenated(*pair, relu, "triton")
    torch.testing.assert_close(y, concatenated(*pair, relu, "cuda"), atol=0, rtol=0, equal_nan=True)
    gradients = [torch.randn_like(y) for _ in range(count)]
    total = torch.stack(gradients).float().sum(0)
    if relu:
        total = torch.ops.aten.threshold_backward(total, y.float(), 0)
    wanted = list(total.half().chunk(2, dim=1))
    found = taken_apart(gradients, y, relu, "triton")
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_registration(shape: tuple[int, ...], relu: bool, device: torch.device) -> None:
    pair = [x.detach() for x in pair_of(shape, device)]
    torch.library.opcheck(_concatenated, (*pair, relu))
    y = concatenated(*pair, relu, "triton")
    torch.library.opcheck(_taken_apart, ([y, torch.randn_like(y)], y, relu))


def test_gradcheck(device: torch.device) -> None:
    torch.manual_seed(0)
    pair = pair_of((1, 3, 2, 3), device)

    def rectified(*pair: Tensor) -> Tensor:
        source = RectifiedPair("triton", *pair)
        return source.rectified(torch.sin) * source.rectified(torch.exp)

    assert torch.autograd.gradcheck(rectified, pair)


def test_bad_arguments_are_named(device: torch.device) -> None:
    x = torch.randn(1, 2, 3, 3, device=device)
    with pytest.raises(OperandError, match="second: shape"):
        pair_readers(x, x[:, :1], only_rectified=True)
    with use_backend("triton"), pytest.raises(BackendError, match="second is torch.bfloat16"):
        pair_readers(x, x.bfloat16(), only_rectified=True)
    with use_backend("triton"), pytest.raises(AssertionError, match="rectified only"):
        pair_readers(x, x, only_rectified=True).plain()
