"""Weights cast together against weights cast one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops import cast_together, copies_together, use_backend


def weights(device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    values = [torch.randn(4, 3, 3, 3), torch.randn(5, 4, 1, 1), torch.randn(4)]
    values[0] = values[0].contiguous(memory_format=torch.channels_last)
    return [value.to(device).requires_grad_() for value in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_one_by_one(dtype: torch.dtype, device: torch.device) -> None:
    own = weights(device)
    with use_backend("triton"):
        copies = cast_together(own, dtype)
    gradients = [torch.randn(w.shape, device=device).to(dtype) for w in own]
    found = torch.autograd.grad(copies, own, gradients)
    for weight, copy, gradient, g in zip(own, copies, found, gradients, strict=True):
        assert torch.equal(copy, weight.to(dtype)) and copy.stride() == weight.stride()
        assert torch.equal(gradient, g.float()) and gradient.dtype == torch.float32
        assert gradient.stride() == weight.stride()


def test_copies_made_ahead_are_the_ones(device: torch.device) -> None:
    own = [torch.full((2,), 1.0 + i, device=device).requires_grad_() for i in range(3)]
    with use_backend("triton"):
        made = copies_together(own, torch.bfloat16)
        addresses = [copy.data_ptr() for copy in made]
        copies = cast_together(own, torch.bfloat16, made)
    assert [copy.data_ptr() for copy in copies] == addresses
    sum(i * copy.float().sum() for i, copy in enumerate(copies)).backward()
    for i, (weight, copy) in enumerate(zip(own, copies, strict=True)):
        assert torch.equal(copy, weight.bfloat16())
        assert torch.equal(weight.grad, torch.full_like(weight, i))


def test_gradients_may_be_cast_after_autograd_has_collected_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = weights(device)
    put_off: list[Callable[[], None]] = []
    module = sys.modules["lgcnet_fast.ops.cast_together"]
    monkeypatch.setattr(module, "beside_next", lambda device, job: put_off.append(job))
    with use_backend("triton"):
        copies = cast_together(own, torch.bfloat16)
    sum((i + 1) * copy.float().sum() for i, copy in enumerate(copies)).backward()
    (job,) = put_off
    for weight in own:
        weight.grad.fill_(torch.nan)
    job()
    for i, weight in enumerate(own):
        assert torch.equal(weight.grad, torch.full_like(weight, i + 1))


def test_a_copy_that_nothing_depends_on(device: torch.device) -> None:
    own = weights(device)
    with use_backend("triton"):
        first, *_ = cast_together(own, torch.bfloat16)
    first.sum().backward()
    assert torch.equal(own[0].grad, torch.ones_like(own[0]))
    assert own[1].grad is None and own[2].grad is None


def test_the_reference_leaves_it_to_autocast() -> None:
    own = weights(torch.device("cpu"))
    with use_backend("reference"):
        assert copies_together(own, torch.bfloat16) == []
        assert all(a is b for a, b in zip(cast_together(own, torch.bfloat16), own, strict=True))


def test_other_dtypes_are_refused(device: torch.device) -> None:
    with use_backend("triton"), pytest.raises(BackendError, match=r"weights\[0\] is torch.float64"):
        cast_together([torch.zeros(2, dtype=torch.float64, device=device)], torch.bfloat16)
