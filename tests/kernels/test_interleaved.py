"""Convolutions of even and odd pixels against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.kernels.interleaved import interleaved, interleaved_gradients, summed
from lgcnet_fast.kernels.pointwise_backward import ProductGradientsConfig
from tests.combinations import some_combinations
from tests.kernels.products import CUDA, DTYPES, assert_close, random_map, random_weight

TILE = ProductGradientsConfig(block_m=16, block_c=16, warps=1, stages=2, programs=3)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    even: int
    odd: int
    config: ProductGradientsConfig | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """dy, x, even, odd."""
        torch.manual_seed(0)
        images, channels, height, width = self.shape
        size = (-(-height // 2), -(-width // 2))
        dy = random_map((images, self.even + self.odd, *size), dtype, device)
        x = random_map(self.shape, dtype, device)
        weights = (random_weight((count, channels), device) for count in (self.even, self.odd))
        return dy, x, *(weight.to(dtype) for weight in weights)


CASES = [
    Case((2, 1, 1, 1), 1, 1),
    Case((2, 3, 3, 5), 2, 3),
    Case((1, 17, 6, 7), 9, 8, TILE),
    Case((2, 48, 5, 4), 24, 24, TILE),
    Case((1, 70, 4, 6), 33, 1),
]
if CUDA:
    CASES += [
        Case((2, 255, 49, 97), 3, 255),
        Case((16, 64, 64, 128), 32, 32),
        Case((16, 128, 32, 64), 64, 64),
    ]


def halves(x: Tensor, like: Tensor) -> list[Tensor]:
    """The even and the odd pixels, zero beyond the map."""
    images, channels, height, width = x.shape
    padded = x.new_zeros(images, channels, 2 * like.shape[2], 2 * like.shape[3])
    padded[:, :, :height, :width] = x
    return [padded[:, :, half::2, half::2] for half in (0, 1)]


@some_combinations("case, dtype", CASES, DTYPES)
def test_forward(case, dtype, device, guarded):
    dy, x, *weights = case.inputs(dtype, device)
    y = interleaved(x, *weights)
    assert y.dtype == dtype and y.stride() == dy.stride()
    pairs = list(zip(halves(x.double(), dy), [w.double() for w in weights], strict=True))
    truth, magnitude = (
        torch.cat([torch.einsum("nchw,oc->nohw", of(part), of(w)) for part, w in pairs], dim=1)
        for of in (lambda value: value, torch.abs)
    )
    assert_close(y, truth, magnitude)


@some_combinations("case, dtype", CASES, DTYPES)
def test_gradients(case, dtype, device, guarded):
    dy, x, *weights = case.inputs(dtype, device)
    dx, shares = interleaved_gradients(dy, x, *weights, case.config)
    assert not shares.isnan().any()
    dw = summed(shares, dtype)
    assert dx.dtype == dw.dtype == dtype and dx.stride() == x.stride()

    def gradients(absolute: bool) -> list[Tensor]:
        of = torch.abs if absolute else (lambda value: value)
        exact = of(x.double()).requires_grad_()
        parts = of(dy.double()).split([case.even, case.odd], dim=1)
        every = list(zip(parts, halves(exact, dy), weights, strict=True))
        total = sum(torch.einsum("nohw,oc,nchw->", g, of(w.double()), part) for g, part, w in every)
        products = [torch.einsum("nohw,nchw->oc", g, part.detach()) for g, part, _ in every]
        return [*torch.autograd.grad(total, exact), torch.cat(products)]

    for result, truth, magnitude in zip((dx, dw), gradients(False), gradients(True), strict=True):
        assert_close(result, truth, magnitude)


def test_same_inputs_same_bits(device):
    dy, x, *weights = CASES[2].inputs(torch.bfloat16, device)
    first, second = (interleaved_gradients(dy, x, *weights, TILE) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_bad_arguments_are_named(device):
    dy, x, even, odd = CASES[1].inputs(torch.float32, device)
    for arguments, message in (
        ((x.contiguous(), even, odd), "x: strides"),
        ((x, even[:, :2], odd), "even: shape"),
        ((x, even.new_empty(0, 3), odd), "even: shape"),
        ((x, even, odd.half()), "odd: dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            interleaved(*arguments)
        with pytest.raises(ValueError, match=message):
            interleaved_gradients(dy, *arguments)
    with pytest.raises(ValueError, match="dy: shape"):
        interleaved_gradients(dy[:, :4].contiguous(memory_format=torch.channels_last), x, even, odd)
    with pytest.raises(ValueError, match="dy: dtype"):
        interleaved_gradients(dy.half(), x, even, odd)
