"""Maps that are computed again in the backward pass instead of kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lgcnet_fast.ops.recompute import recomputed


def test_only_the_value_is_computed_again() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    calls = []
    value = x.exp()

    def again() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x.detach().exp()

    with recomputed((value, again)):
        out = value * w + w.square()
    assert not calls
    found = torch.autograd.grad(out.sum(), (x, w))
    assert calls == [False]
    wanted = torch.autograd.grad((x.exp() * w + w.square()).sum(), (x, w))
    torch.testing.assert_close(found, wanted)
