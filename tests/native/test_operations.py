"""The operations with backend cuda, their kernels emulated, against the plain forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast import ops
from lgcnet_fast.native import upsample, upsample_argmax, upsample_loss
from lgcnet_fast.ops import backend


@pytest.fixture(autouse=True)
def emulation(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (upsample, upsample_argmax, upsample_loss):
        monkeypatch.setattr(module, "load", lambda: emulated)
    monkeypatch.setattr(backend, "why_not", lambda name, device: None)


def random_map(*shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape).requires_grad_()


def assert_same(operation, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    results = []
    for name in ("cuda", "reference"):
        with ops.use_backend(name):
            y = operation()
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_resizing() -> None:
    x, y, z = random_map(2, 3, 4, 5), random_map(2, 3, 7, 9), random_map(2, 1, 2, 2)
    assert_same(lambda: ops.upsample(x, (7, 9)), [x])
    assert_same(lambda: ops.concat_upsample([x, y, z], (7, 9)), [x, y, z])
    assert_same(lambda: ops.sum_upsample([x, y], (7, 9)), [x, y])
    assert_same(lambda: ops.sum_upsample([y, x, x], (7, 9)), [x, y])


def test_losses() -> None:
    logits = random_map(2, 3, 4, 5)
    target = torch.arange(2 * 7 * 9).view(2, 7, 9) % 4
    target[target == 3] = 255
    weight = torch.tensor([0.5, 2.0, 1.0])
    for loss in (ops.upsample_cross_entropy, ops.upsample_ohem):
        assert_same(lambda loss=loss: loss(logits, target), [logits])
        assert_same(lambda loss=loss: loss(logits, target, weight=weight), [logits])


def test_registration() -> None:
    logits, target = random_map(1, 3, 5, 4).detach(), torch.zeros(1, 9, 7, dtype=torch.uint8)
    registered, check = torch.ops.lgcnet_fast, torch.library.opcheck
    # Without comparing values: the sums of rows that no band has stay unwritten.
    shapes = ("test_schema", "test_faketensor")
    given = (logits, target, None, 255, True, "cuda")
    check(registered.upsample_cross_entropy, given, test_utils=shapes)
    check(registered.upsample_argmax, (logits, [9, 7], "cuda"))
    check(registered.concat_upsample, ([logits, logits], [9, 7], "cuda"))
    check(registered.sum_upsample_backward, (logits, [2, 3], "cuda"))


def test_labels() -> None:
    logits = random_map(2, 3, 4, 5)
    with ops.use_backend("cuda"):
        labels = ops.upsample_argmax(logits, (7, 9))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, ops.upsample_argmax(logits, (7, 9)))


def test_half_precision_gives_float32_losses() -> None:
    logits = random_map(1, 3, 2, 2).detach().bfloat16().requires_grad_()
    target = torch.zeros(1, 3, 3, dtype=torch.uint8)
    with ops.use_backend("cuda"):
        loss = ops.upsample_cross_entropy(logits, target)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad is not None
    torch.testing.assert_close(loss, ops.upsample_cross_entropy(logits, target))
