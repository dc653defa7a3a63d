"""Statistics taken where maps are made, against those that a node takes itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.ops import early_statistics, mixed_norm_sum, take_statistics_early, use_backend
from lgcnet_fast.ops.early_statistics import kept_statistics

SHAPE = (2, 3, 5, 4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Maps of every launch that takes statistics."""
    module = sys.modules["lgcnet_fast.ops.fused_mixed_norm_sum"]
    original, seen = module._batch_statistics, []

    def take(ys: list[Tensor], *options: object) -> Tensor:
        seen.append(sum(len(y) if y.ndim == 5 else 1 for y in ys))
        return original(ys, *options)

    monkeypatch.setattr(module, "_batch_statistics", take)
    return seen


def nhwc(*shape: int, device: torch.device) -> Tensor:
    y = torch.randn(shape, device=device) + 1
    return y.movedim(-3, -1).contiguous().movedim(-1, -3)


def norms(count: int, device: torch.device, eps: float = 1e-5) -> list[nn.BatchNorm2d]:
    return [nn.BatchNorm2d(3, affine=False, eps=eps).to(device) for _ in range(count)]


def node(ys: Sequence[Tensor], own: Sequence[nn.Module | None], z: Tensor) -> list[Tensor]:
    """The sum, its gradients, the running statistics."""
    leaves = [y.detach().requires_grad_() for y in ys]
    with use_backend("triton"):
        out = mixed_norm_sum(leaves, z, own)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    state = [value for norm in own if norm is not None for value in norm.state_dict().values()]
    return [out, *gradients, *state]


@pytest.mark.parametrize("known", ["all", "some", "none"])
def test_a_node_is_the_same(known: str, device: torch.device, counted: list[int]) -> None:
    torch.manual_seed(0)
    ys = [nhwc(*SHAPE, device=device), nhwc(2, *SHAPE, device=device), nhwc(*SHAPE, device=device)]
    z = torch.rand(4, device=device)
    wanted = node(ys, [*norms(3, device), None], z)
    assert counted.pop() == 3
    own = [*norms(3, device), None]
    with early_statistics(), use_backend("triton"):
        if known != "none":
            take_statistics_early(ys[1:], own[1:])
        if known == "all":
            take_statistics_early(ys[:1], own[:1])
        found = node(ys, own, z)
        assert kept_statistics(ys[1:2], 1e-5) is None, "a reader that has asked is gone"
    assert counted == {"all": [2, 1], "some": [2, 3], "none": [3]}[known]
    torch.testing.assert_close(found, wanted)


def test_a_map_of_two_nodes_has_its_statistics_taken_once(
    device: torch.device, counted: list[int]
) -> None:
    y, z = nhwc(*SHAPE, device=device), torch.rand(1, device=device)
    first, second = norms(2, device)
    with early_statistics(), use_backend("triton"):
        take_statistics_early([y, y], [first, second])
        outcomes = [node([y], [norm], z) for norm in (first, second)]
    assert counted == [1]
    torch.testing.assert_close(*outcomes)


def test_maps_of_different_sizes_and_other_eps(device: torch.device, counted: list[int]) -> None:
    small, large = nhwc(*SHAPE, device=device), nhwc(2, 3, 7, 6, device=device)
    own, other = norms(2, device), norms(1, device, eps=1e-2)
    with early_statistics(), use_backend("triton"):
        take_statistics_early([small, large], own)
        assert counted == [1, 1]
        found = node([large], other, torch.ones(1, device=device))
        assert counted == [1, 1, 1]
    torch.testing.assert_close(
        found, node([large], norms(1, device, 1e-2), torch.ones(1).to(large))
    )


def test_memory_that_is_taken_again_has_no_statistics(device: torch.device) -> None:
    """What is known is held, so that nothing else can lie there."""
    with early_statistics(), use_backend("triton"):
        y = nhwc(*SHAPE, device=device)
        take_statistics_early([y], norms(1, device))
        place = y.data_ptr()
        del y
        others = [nhwc(*SHAPE, device=device) for _ in range(20)]
        assert all(other.data_ptr() != place for other in others)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nothing_is_taken(backend: str, device: torch.device, counted: list[int]) -> None:
    """Outside a pass, in evaluation, for the reference, for identities."""
    y, (norm,) = nhwc(*SHAPE, device=device), norms(1, device)
    with use_backend(backend):
        take_statistics_early([y], [norm])
        with early_statistics():
            take_statistics_early([y], [None])
            take_statistics_early([y], [norm.eval()])
            if backend == "reference":
                take_statistics_early([y], [norm.train()])
            assert kept_statistics([y], norm.eps) is None
    assert counted == []
