"""Concatenation and sum of resized maps against PyTorch's interpolation in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels import concat_upsample_backward as backward_module
from lgcnet_fast.kernels.bilinear import most_outputs_beside
from lgcnet_fast.kernels.concat_upsample import (
    FORWARD,
    concat_upsample_forward,
    sum_upsample_forward,
)
from lgcnet_fast.kernels.concat_upsample_backward import (
    BACKWARD,
    concat_upsample_backward,
    sum_upsample_backward,
)
from lgcnet_fast.kernels.rows import StripConfig
from tests.combinations import some_combinations

SMALL = StripConfig(block=128, rows=2, warps=4)
CUDA = torch.cuda.is_available()
Size = tuple[int, int]

# (sizes of the maps, size of the output)
LAYOUTS: list[tuple[list[Size], Size]] = [
    ([(3, 5), (2, 3), (1, 1)], (3, 5)),
    ([(4, 3), (2, 2), (1, 2), (5, 4)], (5, 4)),
    ([(4, 5), (3, 1)], (7, 3)),
    ([(3, 3)], (1, 1)),
    ([(1, 2)], (10, 12)),
    ([(1, 1), (5, 2)], (37, 9)),  # more outputs of an input than a program loads at once
]
if CUDA:
    LAYOUTS += [
        ([(49, 97), (25, 49), (13, 25)], (49, 97)),
        ([(97, 193), (49, 97), (49, 97)], (97, 193)),
        ([(45, 60), (23, 30), (12, 15)], (90, 120)),
    ]


CASES = [
    *((layout, dtype) for layout in LAYOUTS for dtype in (torch.float32, torch.bfloat16)),
    (LAYOUTS[0], torch.float16),
    (LAYOUTS[0], torch.float64),
]


def random_map(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(tuple(shape), dtype=torch.float64, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def random_maps(
    sizes: Sequence[Size], channels: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    torch.manual_seed(1)
    return [
        random_map((2, c, *size), dtype, device) for c, size in zip(channels, sizes, strict=True)
    ]


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device):
    """An NHWC map full of NaN, and the canaries that follow it in memory."""
    n, c, h, w = shape
    memory = torch.full((n * c * h * w + 64,), float("nan"), dtype=dtype, device=device)
    memory[-64:] = 7
    return memory[:-64].view(n, h, w, c).permute(0, 3, 1, 2), memory[-64:]


def truth(maps: Sequence[Tensor], size: Size, add: bool) -> Tensor:
    resized = [
        F.interpolate(x.double(), size=size, mode="bilinear", align_corners=True) for x in maps
    ]
    return torch.stack(resized).sum(0) if add else torch.cat(resized, dim=1)


def around(x: Tensor) -> Tensor:
    """The sum over 3x3 windows.

    Between two inputs, an interpolation of it has weights of 1 or more for both: of magnitudes, it
    bounds the sum over all neighbours of an output, however small their own weights are.
    """
    return 9 * F.avg_pool2d(x, 3, stride=1, padding=1)


def assert_rounded(actual: Tensor, expected: Tensor, scale: Tensor | float) -> None:
    """Within one unit of the storage dtype, and what float32 adds.

    scale: the sum of the magnitudes that a result is made from, each with a weight of 1. A fraction
    f is a product with a reciprocal, which compiled kernels compute to 2 units, so that both f and
    1 - f may be off by 2.5 units of 1, along either axis; the rest is for products and sums.
    """
    dtype = actual.dtype
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = torch.finfo(dtype).eps * expected.abs() + 12 * computed * scale
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"error {error.max()}, {(error / bound).max()} times the bound"


def widths(layout: tuple[list[Size], Size], add: bool) -> list[int]:
    sizes, _ = layout
    return [3] * len(sizes) if add else [8, 3, 1, 17][: len(sizes)]


@pytest.mark.parametrize("add", [False, True], ids=["concat", "sum"])
@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_forward_is_float64_interpolation(layout, dtype, add, device):
    sizes, size = layout
    maps = random_maps(sizes, widths(layout, add), dtype, device)
    expected = truth(maps, size, add)
    out, canaries = poisoned(expected.shape, dtype, device)
    (sum_upsample_forward if add else concat_upsample_forward)(maps, size, out, SMALL)
    scale = truth([around(x.double().abs()) for x in maps], size, add)
    assert_rounded(out, expected, scale)
    assert (canaries == 7).all()


@pytest.mark.parametrize("add", [False, True], ids=["concat", "sum"])
@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_backward_is_float64_gradient(layout, dtype, add, device):
    sizes, size = layout
    channels = widths(layout, add)
    leaves = [x.double().requires_grad_() for x in random_maps(sizes, channels, dtype, device)]
    grad = random_map(truth(leaves, size, add).shape, dtype, device)
    expected = torch.autograd.grad(truth(leaves, size, add), leaves, grad.double())
    reached = truth([around(x) for x in leaves], size, add)
    scales = torch.autograd.grad(reached, leaves, grad.double().abs())
    outs, canaries = zip(*(poisoned(x.shape, dtype, device) for x in leaves), strict=True)
    if add:
        sum_upsample_backward(grad, sizes, outs, SMALL)
    else:
        concat_upsample_backward(grad, channels, sizes, outs, SMALL)
    for actual, wanted, scale, canary in zip(outs, expected, scales, canaries, strict=True):
        assert_rounded(actual, wanted, scale)
        assert (canary == 7).all()


@some_combinations(
    "case, rows",
    [
        (([(9, 5), (17, 9)], (17, 9)), [48, 24]),  # 2n - 1 of n
        (([(8, 4), (5, 11)], (16, 8)), [8, 96]),  # 2n of n, and narrower than the map
        (([(4, 3)], (14, 12)), [144]),
    ],
    (1, 2, 4),
)
def test_strips_of_any_length_are_float64_gradients(case, rows, device, monkeypatch):
    monkeypatch.setattr(backward_module, "_PROGRAMS", 0)
    (sizes, size), channels = case
    leaves = [x.double() for x in random_maps(sizes, channels, torch.float16, device)]
    leaves = [x.requires_grad_() for x in leaves]
    grad = random_map(truth(leaves, size, add=False).shape, torch.float16, device)
    expected = torch.autograd.grad(truth(leaves, size, add=False), leaves, grad.double())
    reached = truth([around(x) for x in leaves], size, add=False)
    scales = torch.autograd.grad(reached, leaves, grad.double().abs())
    config = StripConfig(512, rows, 2)
    for actual, wanted, scale in zip(
        concat_upsample_backward(grad, channels, sizes, config=config),
        expected,
        scales,
        strict=True,
    ):
        assert_rounded(actual, wanted, scale)


def test_nan_stays_in_the_pixels_that_read_it(device):
    grad = random_map((1, 8, 17, 17), torch.float32, device)
    grad[0, :, 7, 9] = float("nan")
    (x_grad,) = concat_upsample_backward(grad, [8], [(9, 9)])
    found = x_grad[0, 0].isnan().nonzero().tolist()
    assert found == [[3, 4], [3, 5], [4, 4], [4, 5]]


@pytest.mark.parametrize("config", [StripConfig(16, 1, 1), StripConfig(32, 3, 2)], ids=str)
def test_tile_sizes_change_the_result_by_rounding_at_most(config, device):
    """Which products are fused with sums is the compiler's choice, for each tile anew."""
    sizes, size = [(4, 5), (3, 4)], (4, 5)
    maps = random_maps(sizes, [8, 4], torch.float32, device)
    grad = random_map((2, 12, *size), torch.float32, device)
    outs = [concat_upsample_forward(maps, size, config=c) for c in (config, FORWARD)]
    grads = [concat_upsample_backward(grad, [8, 4], sizes, config=c) for c in (config, BACKWARD)]
    leaves = [x.double().requires_grad_() for x in maps]
    reached = truth([around(x.abs()) for x in leaves], size, add=False)
    magnitudes = truth([around(x) for x in leaves], size, add=False)
    scales = torch.autograd.grad(magnitudes, leaves, grad.double().abs())
    for one, other, scale in zip(
        (outs[0], *grads[0]), (outs[1], *grads[1]), (reached, *scales), strict=True
    ):
        difference = (one.double() - other.double()).abs()
        assert (difference <= 4 * torch.finfo(torch.float32).eps * scale).all()


def test_outputs_beside_an_input_are_counted():
    for inputs in range(1, 12):
        for outputs in range(1, 30):
            distance = max(outputs - 1, 1)
            stride = inputs - 1 if outputs > 1 else 0
            read = [
                sum(abs(o * stride - i * distance) < distance for o in range(outputs))
                for i in range(inputs)
            ]
            assert most_outputs_beside(inputs, outputs) >= max(read)
            assert most_outputs_beside(inputs, outputs) == max(read) or 1 in (inputs, outputs)


def test_aligned_corners_map_2n_minus_1_exactly(device):
    """Every second output of sizes n -> 2n - 1 is an input."""
    (x,) = random_maps([(4, 3)], [8], torch.bfloat16, device)
    out = concat_upsample_forward([x], (7, 5))
    assert torch.equal(out[:, :, ::2, ::2], x)


class _Concat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, size, *maps):
        ctx.channels = [x.shape[1] for x in maps]
        ctx.sizes = [tuple(x.shape[2:]) for x in maps]
        return concat_upsample_forward(maps, size)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous(memory_format=torch.channels_last)
        return None, *concat_upsample_backward(grad, ctx.channels, ctx.sizes)


def test_gradcheck(device):
    maps = random_maps([(2, 2), (1, 3)], [2, 1], torch.float64, device)
    maps = [x[:1].requires_grad_() for x in maps]
    assert torch.autograd.gradcheck(lambda *xs: _Concat.apply((3, 3), *xs), maps, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_same_inputs_same_bits(dtype, device):
    maps = random_maps([(3, 4), (2, 2)], [8, 8], dtype, device)
    grad = random_map((2, 16, 5, 6), dtype, device)
    runs = [
        (
            concat_upsample_forward(maps, (5, 6)),
            sum_upsample_forward(maps, (5, 6)),
            *concat_upsample_backward(grad, [8, 8], [(3, 4), (2, 2)]),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.skipif(not CUDA, reason="needs 13 GB of GPU memory")
def test_more_than_2_31_elements(device):
    """Offsets are 64-bit: the last image of a huge batch comes out right."""
    x = torch.randn(34, 64, 500, 1000, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    out = concat_upsample_forward([x], (1000, 1000))
    last = truth([x[-1:]], (1000, 1000), add=False)
    assert_rounded(out[-1:], last, 8.0)
    (x_grad,) = concat_upsample_backward(out, [64], [(500, 1000)])
    (expected,) = concat_upsample_backward(out[-1:], [64], [(500, 1000)])
    assert torch.equal(x_grad[-1:], expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.contiguous(), r"maps\[1\]: strides .* channels_last"),
        (lambda x: x[:, :4], r"maps\[1\]: strides .* channels_last"),
        (lambda x: x.transpose(2, 3), r"maps\[1\]: strides .* channels_last"),
        (lambda x: x[:1], r"maps\[1\]: shape \(1, 8, 3, 4\), need \(2, 8, 3, 4\)"),
        (lambda x: x[:0], r"maps\[1\]: empty map"),
        (lambda x: x.half(), r"maps\[1\]: dtype torch.float16, maps\[0\] has torch.float32"),
        (lambda x: x.long(), r"maps\[1\]: dtype torch.int64"),
        (lambda x: x[0], r"maps\[1\]: need a map \(N, C, H, W\), got shape \(8, 3, 4\)"),
    ],
)
def test_unfit_maps_are_refused(spoil, message, device):
    one, other = random_maps([(3, 4), (3, 4)], [8, 8], torch.float32, device)
    with pytest.raises(ValueError, match=message):
        concat_upsample_forward([one, spoil(other)], (3, 4))


def test_unfit_arguments_are_refused(device):
    (x,) = random_maps([(3, 4)], [8], torch.float32, device)
    with pytest.raises(ValueError, match="maps: 5 given, need 1 to 4"):
        concat_upsample_forward([x] * 5, (3, 4))
    with pytest.raises(ValueError, match="maps: 0 given"):
        sum_upsample_forward([], (3, 4))
    with pytest.raises(ValueError, match=r"size: \(0, 4\)"):
        concat_upsample_forward([x], (0, 4))
    with pytest.raises(ValueError, match=r"out: shape \(2, 8, 3, 4\), need \(2, 16, 3, 4\)"):
        concat_upsample_forward([x, x], (3, 4), out=x)
    with pytest.raises(ValueError, match="grad: 8 channels.* sum up to 9"):
        concat_upsample_backward(x, [4, 5], [(1, 1), (2, 2)])
    with pytest.raises(ValueError, match="sizes: 1 for 2 maps"):
        concat_upsample_backward(x, [4, 4], [(1, 1)])


def test_sum_of_different_widths_is_refused(device):
    maps = random_maps([(3, 4), (3, 4)], [8, 4], torch.float32, device)
    with pytest.raises(ValueError, match=r"maps\[1\]: shape \(2, 4, 3, 4\), need \(2, 8, 3, 4\)"):
        sum_upsample_forward(maps, (3, 4))
