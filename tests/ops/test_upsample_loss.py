import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lgcnet_fast.ops import upsample, upsample_argmax, upsample_cross_entropy, upsample_ohem

CLASSES = 5


def _case(seed, ignored=0.2, shape=(2, 9, 13), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], CLASSES, 4, 5, dtype=dtype, generator=g) * 3
    target = torch.randint(0, CLASSES, shape, generator=g)
    target[torch.rand(shape, generator=g) < ignored] = 255
    return logits.requires_grad_(), target


def _oracle(logits, target, threshold, keep, weight):
    """Pixel by pixel in Python, as the definition says."""
    full = upsample(logits, tuple(target.shape[-2:]))
    log_probability = full.log_softmax(1)
    pixels = []
    for n, y, x in (target != 255).nonzero().tolist():
        label = int(target[n, y, x])
        pixels.append((-log_probability[n, label, y, x], label))
    pixels.sort(key=lambda pixel: -pixel[0].item())
    least = math.ceil(keep * len(pixels))
    chosen = [
        (loss, weight[label])
        for rank, (loss, label) in enumerate(pixels)
        if rank < least or math.exp(-loss.item()) < threshold
    ]
    return sum(loss * w for loss, w in chosen) / sum(w for _, w in chosen)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_torch(weighted):
    logits, target = _case(0)
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.5 if weighted else None
    expected = F.cross_entropy(upsample(logits, (9, 13)), target, weight, ignore_index=255)
    torch.testing.assert_close(upsample_cross_entropy(logits, target, weight), expected)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    threshold=st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]),
    keep=st.sampled_from([0.0, 0.01, 1 / 16, 0.3, 1.0]),
    ignored=st.sampled_from([0.0, 0.3, 0.98]),
    weighted=st.booleans(),
)
def test_ohem_equals_the_definition(seed, threshold, keep, ignored, weighted):
    logits, target = _case(seed, ignored, shape=(2, 5, 7))
    if (target != 255).sum() == 0 or (keep == 0 and threshold < 0.2):
        return
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1 if weighted else None
    found = upsample_ohem(logits, target, threshold, keep, weight)
    flat = torch.ones(CLASSES, dtype=torch.float64) if weight is None else weight
    expected = _oracle(logits, target, threshold, keep, flat)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted)


def test_ohem_in_float32_follows_float64():
    logits, target = _case(3)
    single = logits.detach().float().requires_grad_()
    upsample_ohem(logits, target).backward()
    upsample_ohem(single, target).backward()
    torch.testing.assert_close(single.grad.double(), logits.grad, rtol=1e-4, atol=1e-7)


def test_ohem_of_everything_is_cross_entropy():
    logits, target = _case(4)
    torch.testing.assert_close(
        upsample_ohem(logits, target, threshold=0.0, keep=1.0),
        upsample_cross_entropy(logits, target),
    )


@pytest.mark.parametrize("loss", [upsample_cross_entropy, upsample_ohem])
@pytest.mark.parametrize("weight", [None, torch.ones(CLASSES)])
def test_a_batch_without_valid_pixels_gives_zero(loss, weight):
    logits, target = _case(5, dtype=torch.float32)
    value = loss(logits, torch.full_like(target, 255), weight=weight)
    value.backward()
    assert value == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("loss", [upsample_cross_entropy, upsample_ohem])
def test_labels_may_be_bytes_and_logits_half(loss):
    logits, target = _case(6, dtype=torch.float32)
    half = loss(logits.bfloat16(), target.to(torch.uint8))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(logits.bfloat16().float(), target))


def test_other_ignore_index():
    logits, target = _case(7)
    other = torch.where(target == 255, -1, target)
    for loss in (upsample_cross_entropy, upsample_ohem):
        torch.testing.assert_close(loss(logits, other, ignore_index=-1), loss(logits, target))


def test_argmax():
    logits, _ = _case(8)
    labels = upsample_argmax(logits, (9, 13))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), upsample(logits, (9, 13)).argmax(1))
    assert upsample_argmax(torch.randn(1, 300, 2, 2), (3, 3)).dtype == torch.int64
