"""Fused upsampling with loss or argmax against full-resolution logits in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgcnet_fast.kernels.order_statistic import hardest_loss
from lgcnet_fast.kernels.upsample_argmax import upsample_argmax_forward
from lgcnet_fast.kernels.upsample_cells import CellConfig
from lgcnet_fast.kernels.upsample_loss import (
    LOSS,
    upsample_cross_entropy_forward,
    upsample_loss_backward,
    upsample_ohem_forward,
)
from lgcnet_fast.ops import upsample_loss as reference

CUDA = torch.cuda.is_available()
Size = tuple[int, int]
Shape = tuple[int, Size, Size]

# (classes, size of the logits, size of the labels)
SHAPES: list[Shape] = [
    (5, (3, 4), (9, 13)),
    (1, (1, 1), (3, 4)),
    (3, (3, 2), (1, 1)),
    (3, (1, 6), (4, 7)),
    (2, (7, 3), (8, 4)),
]
if CUDA:
    SHAPES += [
        (19, (49, 97), (193, 385)),
        (19, (64, 128), (256, 512)),
        (11, (90, 120), (360, 480)),
        (32, (25, 33), (97, 129)),
    ]
CASES = [
    *((shape, torch.float32) for shape in SHAPES),
    *((SHAPES[0], dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every buffer that the launchers allocate starts as NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_logits(
    shape: tuple[int, Size, Size], dtype: torch.dtype, device: torch.device
) -> Tensor:
    torch.manual_seed(3)
    classes, size, _ = shape
    logits = 3 * torch.randn(2, classes, *size, dtype=torch.float64, device=device)
    return logits.to(dtype).contiguous(memory_format=torch.channels_last)


def random_labels(shape: Shape, device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
    torch.manual_seed(4)
    classes, _, size = shape
    labels = torch.randint(classes, (2, *size), device=device)
    labels[torch.rand(labels.shape, device=device) < 0.2] = 255
    labels[0, 0, 0] = 0
    return labels.to(dtype)


def pixel_losses(logits: Tensor, labels: Tensor) -> Tensor:
    full = F.interpolate(
        logits.double(), size=labels.shape[1:], mode="bilinear", align_corners=True
    )
    return F.cross_entropy(full, labels.long(), ignore_index=255, reduction="none")


def weighted_mean(losses: Tensor, labels: Tensor, counted: Tensor, weight: Tensor | None) -> Tensor:
    weights = torch.ones(256) if weight is None else F.pad(weight, (0, 256 - len(weight)))
    v = weights.double().to(losses.device)[labels.long()] * counted
    return (v * losses).sum() / v.sum()


def true_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    return weighted_mean(pixel_losses(logits, labels), labels, labels != 255, weight)


def true_ohem(
    logits: Tensor, labels: Tensor, threshold: float, keep: float, weight: Tensor | None
) -> Tensor:
    losses = pixel_losses(logits, labels)
    ranked = losses.detach()[labels != 255].sort(descending=True).values
    hardest = ranked[math.ceil(keep * len(ranked)) - 1] if keep else math.inf
    hard = (labels != 255) & ((losses.neg().exp() < threshold) | (losses >= hardest))
    return weighted_mean(losses, labels, hard, weight)


def assert_like_truth(loss: Tensor, grad: Tensor, logits: Tensor, truth) -> None:
    """`truth` maps float64 logits to the loss."""
    leaf = logits.double().requires_grad_()
    expected = truth(leaf)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    computed = torch.finfo(loss.dtype).eps
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert (loss - expected).abs() <= 16 * computed * (1 + expected.abs())
    assert grad.dtype == logits.dtype and grad.stride() == logits.stride()
    # Both terms of softmax - [c = y] are rounded, also where they cancel, as with a single class:
    # the weights of the pixels that read a logit add up to 1 / (N h w) on average.
    largest = expected_grad.abs().max().clamp(min=logits.shape[1] / logits.numel())
    bound = torch.finfo(grad.dtype).eps * expected_grad.abs() + 32 * computed * largest
    if grad.dtype == torch.float16:
        bound += 2**-24  # Below it float16 knows only 0.
    error = (grad.double() - expected_grad).abs()
    assert (error <= bound).all(), f"error {error.max()} of {largest}"


def one(loss: Tensor) -> Tensor:
    return torch.ones_like(loss)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_cross_entropy_and_gradient(shape, dtype, weighted, device):
    logits, labels = random_logits(shape, dtype, device), random_labels(shape, device)
    weight = torch.rand(shape[0], device=device) + 0.5 if weighted else None
    with poisoned_memory():
        loss, sums = upsample_cross_entropy_forward(logits, labels, weight)
        grad = upsample_loss_backward(sums, one(loss), logits)
    assert_like_truth(loss, grad, logits, lambda x: true_cross_entropy(x, labels, weight))


@pytest.mark.parametrize(
    ("threshold", "keep"), [(0.7, 1 / 16), (0.1, 0.4), (0.0, 0.1), (1.0, 0.0), (0.3, 1.0)]
)
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[5:], ids=str)
def test_ohem_and_gradient(shape, threshold, keep, device):
    logits, labels = random_logits(shape, torch.float32, device), random_labels(shape, device)
    weight = torch.rand(shape[0], device=device) + 0.5
    with poisoned_memory():
        loss, sums = upsample_ohem_forward(logits, labels, threshold, keep, weight)
        grad = upsample_loss_backward(sums, one(loss), logits)
    assert_like_truth(loss, grad, logits, lambda x: true_ohem(x, labels, threshold, keep, weight))


def test_contract_of_the_reference_operation(device):
    logits = random_logits(SHAPES[0], torch.float32, device)
    labels = random_labels(SHAPES[0], device)
    loss, _ = upsample_cross_entropy_forward(logits, labels)
    torch.testing.assert_close(loss, reference.upsample_cross_entropy(logits, labels))
    for threshold, keep in ((0.7, 1 / 16), (0.05, 0.3), (0.0, 0.0)):
        loss, _ = upsample_ohem_forward(logits, labels, threshold, keep)
        torch.testing.assert_close(
            loss, reference.upsample_ohem(logits, labels, threshold, keep), equal_nan=True
        )
    labels = upsample_argmax_forward(logits, (9, 13))
    assert torch.equal(labels, reference.upsample_argmax(logits, (9, 13)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_any_integer_labels(dtype, device):
    logits = random_logits(SHAPES[0], torch.float32, device)
    labels = random_labels(SHAPES[0], device)
    loss, _ = upsample_cross_entropy_forward(logits, labels.to(dtype))
    assert loss == upsample_cross_entropy_forward(logits, labels)[0]


def test_other_ignore_index(device):
    logits = random_logits(SHAPES[0], torch.float32, device)
    labels = random_labels(SHAPES[0], device, torch.int64)
    signed = labels.where(labels != 255, -100)
    loss, _ = upsample_cross_entropy_forward(logits, signed, ignore_index=-100)
    assert loss == upsample_cross_entropy_forward(logits, labels)[0]


def test_all_ignored_gives_zero(device):
    logits = random_logits(SHAPES[0], torch.float32, device)
    labels = torch.full((2, 9, 13), 255, dtype=torch.uint8, device=device)
    for forward in (upsample_cross_entropy_forward, upsample_ohem_forward):
        loss, sums = forward(logits, labels)
        assert loss == 0
        assert (upsample_loss_backward(sums, one(loss), logits) == 0).all()


@pytest.mark.parametrize("forward", [upsample_cross_entropy_forward, upsample_ohem_forward])
def test_label_that_is_no_class_gives_nan(forward, device):
    logits = random_logits(SHAPES[0], torch.float32, device)
    labels = random_labels(SHAPES[0], device)
    labels[1, 4, 5] = 200
    loss, sums = forward(logits, labels)
    assert loss.isnan()
    assert upsample_loss_backward(sums, one(loss), logits).isnan().any()


def test_extreme_logits_stay_finite(device):
    logits = random_logits(SHAPES[0], torch.float32, device) * 1e4
    labels = random_labels(SHAPES[0], device)
    loss, sums = upsample_cross_entropy_forward(logits, labels)
    grad = upsample_loss_backward(sums, one(loss), logits)
    assert_like_truth(loss, grad, logits, lambda x: true_cross_entropy(x, labels, None))


def test_gradient_scales_with_the_gradient_of_the_loss(device):
    """A loss scale is applied before rounding to float16, so that nothing underflows."""
    logits = random_logits(SHAPES[0], torch.float16, device)
    loss, sums = upsample_cross_entropy_forward(logits, random_labels(SHAPES[0], device))
    scaled = upsample_loss_backward(sums, 1024 * one(loss), logits)
    precise = upsample_loss_backward(sums, 1024 * one(loss), logits.float())
    torch.testing.assert_close(scaled.float(), precise, rtol=2**-10, atol=0)


def test_without_gradient(device):
    logits, labels = (
        random_logits(SHAPES[0], torch.float32, device),
        random_labels(SHAPES[0], device),
    )
    loss, sums = upsample_cross_entropy_forward(logits, labels, gradient=False)
    assert sums is None
    assert loss == upsample_cross_entropy_forward(logits, labels)[0]


@pytest.mark.parametrize(("lanes", "rows"), [(2, 1), (16, 3)])
def test_tile_sizes_do_not_change_the_gradient(lanes, rows, device):
    logits, labels = (
        random_logits(SHAPES[0], torch.float32, device),
        random_labels(SHAPES[0], device),
    )
    grads = []
    for config in (LOSS, CellConfig(lanes, rows, warps=1)):
        loss, sums = upsample_cross_entropy_forward(logits, labels, config=config)
        grads.append(upsample_loss_backward(sums, one(loss), logits))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=0)


def test_same_inputs_same_bits(device):
    shape = SHAPES[-3] if CUDA else SHAPES[0]
    logits, labels = random_logits(shape, torch.bfloat16, device), random_labels(shape, device)
    for forward in (upsample_cross_entropy_forward, upsample_ohem_forward):
        (loss, sums), (again, sums_again) = (forward(logits, labels) for _ in range(2))
        assert loss == again
        assert torch.equal(sums.corners[:, :, 0], sums_again.corners[:, :, 0])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        loss, ctx.sums = upsample_cross_entropy_forward(logits, labels)
        ctx.logits = logits
        return loss

    @staticmethod
    def backward(ctx, grad):
        return upsample_loss_backward(ctx.sums, grad, ctx.logits), None


def test_gradcheck(device):
    logits = random_logits((2, (2, 2), (3, 4)), torch.float64, device)[:1].requires_grad_()
    labels = random_labels((2, (2, 2), (3, 4)), device)[:1]
    assert torch.autograd.gradcheck(_CrossEntropy.apply, (logits, labels), fast_mode=True)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_ohem_is_captured_in_a_cuda_graph(device):
    shape = SHAPES[6]
    logits, labels = random_logits(shape, torch.bfloat16, device), random_labels(shape, device)
    upsample_ohem_forward(logits, labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = upsample_ohem_forward(logits, labels)
    logits.mul_(0.5)
    graph.replay()
    assert loss == upsample_ohem_forward(logits, labels)[0]


# -- argmax ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_argmax(shape, dtype, device):
    logits = random_logits(shape, dtype, device)
    size = shape[2]
    memory = torch.full((2 * math.prod(size) + 64,), 99, dtype=torch.uint8, device=device)
    labels = memory[:-64].view(2, *size)
    upsample_argmax_forward(logits, size, out=labels)
    full = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=True)
    chosen = full.gather(1, labels.long()[:, None])[:, 0]
    best = full.max(dim=1).values
    assert (chosen >= best - 1e-5 * full.abs().amax()).all()
    assert (labels == full.argmax(dim=1)).float().mean() > 0.999
    assert (memory[-64:] == 99).all()


def test_argmax_ties_go_to_the_lowest_class(device):
    logits = torch.zeros(1, 4, 2, 3, device=device).contiguous(memory_format=torch.channels_last)
    logits[:, 2:] = 1
    assert (upsample_argmax_forward(logits, (5, 6)) == 2).all()


# -- order statistic --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 1e-6, 0.1, 1 / 16, 0.5, 1.0])
@pytest.mark.parametrize("pixels", [1, 37, 1_000_003 if CUDA else 700])
def test_hardest_loss(pixels, keep, device):
    torch.manual_seed(pixels)
    losses = torch.rand(pixels, device=device).mul(20).exp2().sub(1).mul(1e-3)
    losses[torch.rand(pixels, device=device) < 0.3] = -1
    losses[: pixels // 5] = 0.25  # Ties.
    ranked = losses[losses >= 0].sort(descending=True).values
    rank = math.ceil(keep * len(ranked))
    expected = ranked[rank - 1].item() if rank else math.inf
    assert hardest_loss(losses, keep, block=256, programs=3).item() == expected


def test_hardest_loss_takes_nan_as_infinite(device):
    losses = torch.tensor([1.0, float("nan"), 2.0, -1.0], device=device)
    assert hardest_loss(losses, 0.3).item() == math.inf
    assert hardest_loss(losses, 0.6).item() == 2.0


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"logits": lambda x: x.contiguous()}, "logits: strides"),
        ({"logits": lambda x: x[:, :2]}, "logits: strides"),
        ({"logits": lambda x: x[0]}, "logits: need a map"),
        ({"logits": lambda x: x.repeat(1, 7, 1, 1)}, "logits: 35 classes, at most 32"),
        ({"target": lambda y: y[:1]}, r"target: shape \(1, 9, 13\), need \(2, 9, 13\)"),
        ({"target": lambda y: y.float()}, "target: torch.float32"),
        ({"target": lambda y: y.transpose(1, 2)}, "target: torch.uint8 of strides"),
        ({"target": lambda y: y[:, :0]}, r"size: \(0, 13\)"),
        ({"weight": lambda w: w[:2]}, r"weight: shape \(2,\), need \(5,\)"),
        ({"weight": lambda w: w.long()}, "weight: torch.int64"),
        ({"threshold": lambda _: 1.5}, "threshold: 1.5"),
        ({"keep": lambda _: -0.1}, "keep: -0.1"),
    ],
)
def test_unfit_arguments_are_refused(spoil, message, device):
    arguments = {
        "logits": random_logits(SHAPES[0], torch.float32, device),
        "target": random_labels(SHAPES[0], device),
        "weight": torch.ones(5, device=device),
        "threshold": 0.7,
        "keep": 0.1,
    }
    for name, change in spoil.items():
        changed = change(arguments[name])
        if name == "logits" and changed.dim() == 4 and changed.shape[1] > 32:
            changed = changed.contiguous(memory_format=torch.channels_last)
        arguments[name] = changed
    with pytest.raises(ValueError, match=message):
        upsample_ohem_forward(**arguments)


def test_unfit_argmax_output_is_refused(device):
    logits = random_logits(SHAPES[0], torch.float32, device)
    with pytest.raises(ValueError, match="out: torch.int64"):
        upsample_argmax_forward(logits, (4, 4), out=logits.new_zeros(2, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"size: \(0, 4\)"):
        upsample_argmax_forward(logits, (0, 4))
