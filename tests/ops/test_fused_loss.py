"""Fused losses and labels through the public operations, against their plain forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lgcnet_fast import ops
from lgcnet_fast.errors import BackendError, OperandError

CLASSES = 3
LOSSES = [ops.upsample_cross_entropy, ops.upsample_ohem]
Case = tuple[Tensor, Tensor]


def case(device: torch.device, dtype=torch.float32, size=(2, 3), full=(4, 5), ignore=255) -> Case:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, CLASSES, *size, dtype=torch.float64, device=device)
    target = torch.randint(CLASSES, (2, *full), device=device)
    target[torch.rand(target.shape, device=device) < 0.2] = ignore
    return logits.to(dtype).requires_grad_(), target


def class_weight(device: torch.device) -> Tensor:
    return torch.tensor([0.5, 2.0, 1.0], device=device)


def with_gradient(loss: Callable, backend: str, logits: Tensor, *arguments, **options):
    with ops.use_backend(backend):
        value = loss(logits, *arguments, **options)
    return value, *torch.autograd.grad(3 * value, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_agrees_with_the_reference(loss, weighted, dtype, device) -> None:
    logits, target = case(device, dtype)
    weight = class_weight(device) if weighted else None
    value, gradient = with_gradient(loss, "triton", logits, target, weight=weight)
    exact = logits.detach().double().requires_grad_()
    expected, derivative = with_gradient(loss, "reference", exact, target, weight=weight)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    assert gradient.shape == logits.shape
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    bound = torch.finfo(dtype).eps * derivative.abs() + 1e-5 * derivative.abs().max()
    assert ((gradient.double() - derivative).abs() <= bound).all()


@pytest.mark.parametrize(
    ("size", "full"), [((1, 1), (3, 2)), ((3, 4), (3, 4)), ((4, 3), (2, 2)), ((2, 2), (1, 1))]
)
def test_sizes(size, full, device) -> None:
    logits, target = case(device, size=size, full=full)
    target[0, 0, 0] = 0
    for loss in LOSSES:
        found = with_gradient(loss, "triton", logits, target)
        torch.testing.assert_close(found, with_gradient(loss, "reference", logits, target))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_without_valid_pixels_gives_zero(loss, weighted, device) -> None:
    logits, target = case(device)
    weight = class_weight(device) if weighted else None
    ignored = torch.full_like(target, 255)
    value, gradient = with_gradient(loss, "triton", logits, ignored, weight=weight)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_other_labels_dtypes_and_layouts(loss, device) -> None:
    logits, target = case(device, ignore=-1)
    expected = loss(logits, target, ignore_index=-1)
    with ops.use_backend("triton"):
        for labels in (target.to(torch.int16), target.mT.contiguous().mT):
            torch.testing.assert_close(loss(logits, labels, ignore_index=-1), expected)
        sliced = torch.cat([logits, logits], dim=1)[:, 1:4].roll(1, dims=1)
        torch.testing.assert_close(loss(sliced, target, ignore_index=-1), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_behaves_as_the_reference(loss, device) -> None:
    logits, target = case(device, torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        found = with_gradient(loss, "triton", logits, target)
        expected = with_gradient(loss, "reference", logits, target)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=2**-7, atol=1e-4)


def test_gradients_are_derivatives(device) -> None:
    logits, target = case(device, torch.float64)
    weight = class_weight(device).double()

    def ohem(x: Tensor) -> Tensor:
        return ops.upsample_ohem(x, target, 0.7, 0.5, weight)

    with ops.use_backend("triton"):
        assert torch.autograd.gradcheck(ohem, logits, fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda x: ops.upsample_cross_entropy(x, target, weight), logits, fast_mode=True
        )


def test_registration(device) -> None:
    logits, target = case(device)
    registered, weight = torch.ops.lgcnet_fast, class_weight(device)
    check = torch.library.opcheck
    # Without comparing values: the sums of rows that no band has stay unwritten.
    shapes = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (logits, target, weight, 255, True, "triton")
    check(registered.upsample_cross_entropy, given, test_utils=shapes)
    hard = (logits, target, 0.7, 0.1, None, 255, True, "triton")
    check(registered.upsample_ohem, hard, test_utils=shapes)
    check(registered.upsample_cross_entropy, (logits.detach(), target, None, 255, False, "triton"))
    check(registered.upsample_argmax, (logits.detach(), [4, 5], "triton"))
    _, corners, mass = registered.upsample_cross_entropy(
        logits.detach(), target, None, 255, True, "triton"
    )
    grad, shape = torch.ones((), device=device), list(logits.shape)
    check(registered.upsample_loss_backward, (corners, mass, grad, shape, torch.bfloat16, "triton"))


def test_without_a_gradient_there_are_no_sums(device, monkeypatch) -> None:
    logits, target = case(device)
    seen = []
    from lgcnet_fast.ops import fused_loss

    forward = fused_loss._cross_entropy
    monkeypatch.setattr(
        fused_loss, "_cross_entropy", lambda *given: seen.append(given[-2]) or forward(*given)
    )
    with ops.use_backend("triton"):
        with torch.no_grad():
            ops.upsample_cross_entropy(logits, target)
        assert not ops.upsample_cross_entropy(logits.detach(), target).requires_grad
        ops.upsample_cross_entropy(logits, target).backward()
    assert seen == [False, False, True]


@pytest.mark.parametrize(("size", "full"), [((2, 3), (4, 5)), ((1, 1), (2, 3)), ((3, 4), (3, 4))])
def test_labels(size, full, device) -> None:
    logits, _ = case(device, size=size)
    with ops.use_backend("triton"):
        labels = ops.upsample_argmax(logits, full)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, ops.upsample_argmax(logits, full))


def test_many_classes_are_refused(device) -> None:
    logits, target = torch.zeros(1, 33, 2, 2, device=device), torch.zeros(1, 3, 3, device=device)
    with ops.use_backend("triton"), pytest.raises(BackendError, match="33 classes, at most 32"):
        ops.upsample_argmax(logits, (3, 3))
    with ops.use_backend("triton"), pytest.raises(BackendError, match="33 classes, at most 32"):
        ops.upsample_cross_entropy(logits, target.long())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"logits": torch.ones(2, 3, 4)}, "logits: shape .* need a map"),
        ({"logits": torch.ones(0, 3, 2, 2)}, "logits: empty map"),
        ({"target": torch.zeros(1, 4, 5).long()}, r"target: shape \(1, 4, 5\), need \(2, 4, 5\)"),
        ({"target": torch.zeros(2, 1, 4, 5).long()}, "target: shape"),
        ({"target": torch.zeros(2, 0, 5).long()}, "size of target"),
        ({"target": torch.zeros(2, 4, 5)}, "target: dtype torch.float32, need integers"),
        ({"target": torch.zeros(2, 4, 5, device="meta").long()}, "target: on meta"),
        ({"weight": torch.ones(4)}, r"weight: shape \(4,\), need \(3,\)"),
        ({"weight": torch.ones(3).long()}, "weight: dtype torch.int64, need floats"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_arguments_are_named(loss, change, fault) -> None:
    logits, target = case(torch.device("cpu"))
    with pytest.raises(OperandError, match=fault):
        loss(**({"logits": logits, "target": target} | change))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_are_between_0_and_1(share) -> None:
    logits, target = case(torch.device("cpu"))
    with pytest.raises(OperandError, match="threshold"):
        ops.upsample_ohem(logits, target, threshold=share)
    with pytest.raises(OperandError, match="keep"):
        ops.upsample_ohem(logits, target, keep=share)
