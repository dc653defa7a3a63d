"""Fused upsampling with loss or argmax against full-resolution logits in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lgcnet_fast.native.launcher import Launcher
from lgcnet_fast.native.operands import STORAGE
from lgcnet_fast.native.order_statistic import hardest_loss
from lgcnet_fast.native.upsample_argmax import upsample_argmax_forward
from lgcnet_fast.native.upsample_loss import (
    upsample_cross_entropy_forward,
    upsample_loss_backward,
    upsample_ohem_forward,
)
from tests.native.truth import ROUNDING, nhwc, poisoned_memory

Size = tuple[int, int]
Shape = tuple[int, Size, Size]

# Classes, size of the logits, size of the labels.
SHAPES: list[Shape] = [
    (5, (3, 4), (9, 13)),
    (1, (1, 1), (3, 4)),
    (3, (3, 2), (1, 1)),
    (3, (1, 6), (4, 7)),
    (2, (7, 3), (8, 4)),
    (19, (3, 37), (5, 70)),
    (32, (2, 33), (4, 20)),
    (4, (9, 2), (12, 300)),
]
LARGE: list[Shape] = [
    (19, (49, 97), (193, 385)),
    (19, (64, 128), (256, 512)),
    (11, (90, 120), (360, 480)),
    (32, (25, 33), (97, 129)),
]


def random_logits(shape: Shape, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    classes, size, _ = shape
    return nhwc(3 * torch.randn(2, classes, *size, generator=generator)).to(dtype)


def random_labels(shape: Shape, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    classes, _, size = shape
    labels = torch.randint(classes, (2, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    labels[0, 0, 0] = 0
    return labels.to(dtype)


def full_size(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=True)


def weighted_mean(losses: Tensor, labels: Tensor, counted: Tensor, weight: Tensor | None) -> Tensor:
    weights = torch.ones(256) if weight is None else F.pad(weight, (0, 256 - len(weight)))
    v = weights.double()[labels.long()] * counted
    return (v * losses).sum() / v.sum()


def true_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    hard: tuple[float, float] | None = None,
) -> Tensor:
    """hard: threshold and keep of OHEM."""
    full = full_size(logits, labels.shape[1:])
    losses = F.cross_entropy(full, labels.long(), ignore_index=255, reduction="none")
    counted = labels != 255
    if hard is not None:
        threshold, keep = hard
        ranked = losses.detach()[counted].sort(descending=True).values
        hardest = ranked[math.ceil(keep * len(ranked)) - 1] if keep else math.inf
        counted = counted & ((losses.neg().exp() < threshold) | (losses >= hardest))
    return weighted_mean(losses, labels, counted, weight)


def assert_like_truth(
    loss: Tensor, gradient: Tensor, logits: Tensor, truth: Callable[[Tensor], Tensor]
) -> None:
    """`truth` maps float64 logits to the loss."""
    leaf = logits.double().requires_grad_()
    expected = truth(leaf)
    (exact,) = torch.autograd.grad(expected, leaf)
    assert (loss.cpu() - expected).abs() <= 2**-19 * (1 + expected.abs())
    error = (gradient.double().cpu() - exact).abs()
    bound = ROUNDING[logits.dtype] * 1.01 * exact.abs() + 2**-17 * exact.abs().max()
    assert (error <= bound + 2**-25).all(), f"{(error / bound).max():.3g} x allowed"


def one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def check(launcher: Launcher, shape: Shape, dtype: torch.dtype, weighted: bool) -> None:
    """Cross entropy and its gradient."""
    device = torch.device(launcher.device_type)
    logits, labels = random_logits(shape, dtype), random_labels(shape)
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(5)) + 0.5
    given = weight.to(device) if weighted else None
    with poisoned_memory():
        loss, sums = upsample_cross_entropy_forward(
            logits.to(device), labels.to(device), given, launcher=launcher
        )
        assert sums is not None
        gradient = upsample_loss_backward(sums, one(device), logits.to(device), launcher=launcher)
    exact_weight = weight if weighted else None
    assert_like_truth(loss, gradient, logits, lambda x: true_loss(x, labels, exact_weight))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_and_gradient(launcher: Launcher, shape: Shape, weighted: bool) -> None:
    check(launcher, shape, torch.float32, weighted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(launcher: Launcher, dtype: torch.dtype) -> None:
    check(launcher, SHAPES[0], dtype, weighted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_maps(gpu_launcher: Launcher, shape: Shape, dtype: torch.dtype) -> None:
    check(gpu_launcher, shape, dtype, weighted=True)


@pytest.mark.parametrize(
    ("threshold", "keep"), [(0.7, 1 / 16), (0.1, 0.4), (0.0, 0.1), (1.0, 0.0), (0.3, 1.0)]
)
@pytest.mark.parametrize(
    "shape", [*SHAPES[:1], *(pytest.param(s, marks=pytest.mark.gpu) for s in LARGE)], ids=str
)
def test_ohem_and_gradient(
    launcher: Launcher, device: torch.device, shape: Shape, threshold: float, keep: float
) -> None:
    logits, labels = random_logits(shape, torch.float32), random_labels(shape)
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(5)) + 0.5
    with poisoned_memory():
        loss, sums = upsample_ohem_forward(
            logits.to(device),
            labels.to(device),
            threshold,
            keep,
            weight.to(device),
            launcher=launcher,
        )
        assert sums is not None
        gradient = upsample_loss_backward(sums, one(device), logits.to(device), launcher=launcher)
    hard = (threshold, keep)
    assert_like_truth(loss, gradient, logits, lambda x: true_loss(x, labels, weight, hard))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integer_labels_and_ignore_index(
    launcher: Launcher, device: torch.device, dtype: torch.dtype
) -> None:
    logits, labels = random_logits(SHAPES[0], torch.float32).to(device), random_labels(SHAPES[0])
    signed = labels.to(torch.int64).where(labels != 255, -100).to(dtype)
    expected, _ = upsample_cross_entropy_forward(logits, labels.to(device), launcher=launcher)
    found, _ = upsample_cross_entropy_forward(
        logits, signed.to(device), ignore_index=-100, launcher=launcher
    )
    assert found == expected


@pytest.mark.parametrize("forward", [upsample_cross_entropy_forward, upsample_ohem_forward])
def test_all_ignored_gives_zero(
    launcher: Launcher, device: torch.device, forward: Callable[..., object]
) -> None:
    logits = random_logits(SHAPES[0], torch.float32).to(device)
    labels = torch.full((2, 9, 13), 255, dtype=torch.uint8, device=device)
    loss, sums = forward(logits, labels, launcher=launcher)
    assert loss == 0
    assert (upsample_loss_backward(sums, one(device), logits, launcher=launcher) == 0).all()


@pytest.mark.parametrize("forward", [upsample_cross_entropy_forward, upsample_ohem_forward])
def test_label_that_is_no_class_gives_nan(
    launcher: Launcher, device: torch.device, forward: Callable[..., object]
) -> None:
    logits = random_logits(SHAPES[0], torch.float32).to(device)
    labels = random_labels(SHAPES[0])
    labels[1, 4, 5] = 200
    loss, sums = forward(logits, labels.to(device), launcher=launcher)
    assert loss.isnan()
    assert upsample_loss_backward(sums, one(device), logits, launcher=launcher).isnan().any()


def test_extreme_logits_stay_finite(launcher: Launcher, device: torch.device) -> None:
    logits, labels = random_logits(SHAPES[0], torch.float32) * 1e4, random_labels(SHAPES[0])
    loss, sums = upsample_cross_entropy_forward(
        logits.to(device), labels.to(device), launcher=launcher
    )
    assert sums is not None
    gradient = upsample_loss_backward(sums, one(device), logits.to(device), launcher=launcher)
    assert_like_truth(loss, gradient, logits, lambda x: true_loss(x, labels, None))


def test_gradient_scales_before_it_is_rounded(launcher: Launcher, device: torch.device) -> None:
    logits = random_logits(SHAPES[0], torch.float16).to(device)
    labels = random_labels(SHAPES[0]).to(device)
    _, sums = upsample_cross_entropy_forward(logits, labels, launcher=launcher)
    assert sums is not None
    scale = 1024 * one(device)
    scaled = upsample_loss_backward(sums, scale, logits, launcher=launcher)
    precise = upsample_loss_backward(sums, scale, logits.float(), launcher=launcher)
    torch.testing.assert_close(scaled.float(), precise, rtol=2**-10, atol=0)


def test_without_gradient(launcher: Launcher, device: torch.device) -> None:
    logits, labels = random_logits(SHAPES[0], torch.float32), random_labels(SHAPES[0])
    arguments = logits.to(device), labels.to(device)
    loss, sums = upsample_cross_entropy_forward(*arguments, gradient=False, launcher=launcher)
    assert sums is None
    assert loss == upsample_cross_entropy_forward(*arguments, launcher=launcher)[0]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_bands_do_not_change_the_gradient(
    launcher: Launcher, device: torch.device, rows: int
) -> None:
    shape = (3, (7, 35), (20, 50))
    logits = random_logits(shape, torch.float32).to(device)
    gradients = []
    for band in (4, rows):
        _, sums = upsample_cross_entropy_forward(
            logits, random_labels(shape).to(device), rows=band, launcher=launcher
        )
        assert sums is not None
        gradients.append(upsample_loss_backward(sums, one(device), logits, launcher=launcher))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_a_gradient_into_a_slice_leaves_the_rest_alone(
    launcher: Launcher, device: torch.device
) -> None:
    logits = random_logits(SHAPES[0], torch.float32).to(device)
    _, sums = upsample_cross_entropy_forward(
        logits, random_labels(SHAPES[0]).to(device), launcher=launcher
    )
    assert sums is not None
    expected = upsample_loss_backward(sums, one(device), logits, launcher=launcher)
    whole = torch.full((2, 3, 4, 9), math.nan, device=device).permute(0, 3, 1, 2)
    upsample_loss_backward(sums, one(device), logits, out=whole[:, 2:7], launcher=launcher)
    assert torch.equal(whole[:, 2:7], expected)
    assert whole[:, :2].isnan().all() and whole[:, 7:].isnan().all()


@pytest.mark.parametrize("forward", [upsample_cross_entropy_forward, upsample_ohem_forward])
def test_the_same_inputs_give_the_same_bits(
    launcher: Launcher, device: torch.device, forward: Callable[..., object]
) -> None:
    logits = random_logits(SHAPES[0], torch.bfloat16).to(device)
    labels = random_labels(SHAPES[0]).to(device)
    (loss, sums), (again, sums_again) = (forward(logits, labels, launcher=launcher) for _ in "ab")
    assert loss == again
    assert torch.equal(sums.corners[:, :, 0], sums_again.corners[:, :, 0])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in SHAPES),
        *((SHAPES[0], dtype) for dtype in (torch.float16, torch.bfloat16)),
        *(pytest.param(shape, torch.float16, marks=pytest.mark.gpu) for shape in LARGE),
    ],
    ids=str,
)
def test_argmax(launcher: Launcher, device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    logits, size = random_logits(shape, dtype), shape[2]
    memory = torch.full((2 * math.prod(size) + 64,), 99, dtype=torch.uint8, device=device)
    out = memory[:-64].view(2, *size)
    upsample_argmax_forward(logits.to(device), size, out=out, launcher=launcher)
    full, labels = full_size(logits, size), out.cpu()
    chosen = full.gather(1, labels.long()[:, None])[:, 0]
    assert (chosen >= full.max(dim=1).values - 1e-5 * full.abs().amax()).all()
    assert (labels == full.argmax(dim=1)).float().mean() > 0.999
    assert (memory[-64:] == 99).all()


def test_argmax_ties_go_to_the_lowest_class(launcher: Launcher, device: torch.device) -> None:
    logits = nhwc(torch.zeros(1, 4, 2, 3))
    logits[:, 2:] = 1
    assert (upsample_argmax_forward(logits.to(device), (5, 6), launcher=launcher) == 2).all()


@pytest.mark.parametrize("keep", [0.0, 1e-6, 0.1, 1 / 16, 0.5, 1.0])
@pytest.mark.parametrize("pixels", [1, 37, 9000, pytest.param(1_000_003, marks=pytest.mark.gpu)])
def test_hardest_loss(launcher: Launcher, device: torch.device, pixels: int, keep: float) -> None:
    generator = torch.Generator().manual_seed(pixels)
    losses = torch.rand(pixels, generator=generator).mul(20).exp2().sub(1).mul(1e-3)
    losses[torch.rand(pixels, generator=generator) < 0.3] = -1
    losses[: pixels // 5] = 0.25  # ties
    ranked = losses[losses >= 0].sort(descending=True).values
    rank = math.ceil(keep * len(ranked))
    expected = ranked[rank - 1].item() if rank else math.inf
    assert hardest_loss(losses.to(device), keep, launcher=launcher).item() == expected


def test_hardest_loss_takes_nan_as_infinite(launcher: Launcher, device: torch.device) -> None:
    losses = torch.tensor([1.0, math.nan, 2.0, -1.0], device=device)
    assert hardest_loss(losses, 0.3, launcher=launcher).item() == math.inf
    assert hardest_loss(losses, 0.6, launcher=launcher).item() == 2.0


BAD = {
    "logits: strides": {"logits": torch.zeros(2, 5, 3, 4)},
    "logits: need a map": {"logits": torch.zeros(5, 3, 4)},
    "logits: 35 classes, at most 32": {"logits": nhwc(torch.zeros(2, 35, 3, 4))},
    r"target: shape \(1, 9, 13\)": {"target": torch.zeros(1, 9, 13, dtype=torch.uint8)},
    "target: dtype torch.float32": {"target": torch.zeros(2, 9, 13)},
    "target: strides": {"target": torch.zeros(2, 13, 9, dtype=torch.uint8).transpose(1, 2)},
    r"size: \(0, 13\)": {"target": torch.zeros(2, 0, 13, dtype=torch.uint8)},
    r"weight: shape \(2,\)": {"weight": torch.ones(2)},
    "weight: dtype torch.int64": {"weight": torch.ones(5, dtype=torch.int64)},
    "threshold: 1.5": {"threshold": 1.5},
    "keep: -0.1": {"keep": -0.1},
    "rows: 0": {"rows": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(emulated: Launcher, message: str) -> None:
    good = {
        "logits": random_logits(SHAPES[0], torch.float32),
        "target": random_labels(SHAPES[0]),
        "weight": torch.ones(5),
    }
    with pytest.raises(ValueError, match=message):
        upsample_ohem_forward(**{**good, **BAD[message]}, launcher=emulated)


def test_bad_outputs_are_named(emulated: Launcher) -> None:
    logits = random_logits(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="out: dtype torch.int64"):
        out = torch.zeros(2, 4, 4, dtype=torch.int64)
        upsample_argmax_forward(logits, (4, 4), out, launcher=emulated)
    with pytest.raises(ValueError, match=r"size: \(0, 4\)"):
        upsample_argmax_forward(logits, (0, 4), launcher=emulated)
    _, sums = upsample_cross_entropy_forward(logits, random_labels(SHAPES[0]), launcher=emulated)
    assert sums is not None
    with pytest.raises(ValueError, match="corners: shape"):
        upsample_loss_backward(sums, torch.ones(()), logits[:1], launcher=emulated)
