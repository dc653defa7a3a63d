"""Maps that are computed again in the backward pass instead of kept."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lgcnet_fast.nn.mixed import MixedOp
from lgcnet_fast.nn.primitives import GlobalPool
from lgcnet_fast.ops.backend import Operation, current_backend, use_backend
from lgcnet_fast.ops.recompute import recomputable, recomputed


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


def test_it_is_computed_again_by_the_backend_that_computed_it() -> None:
    x, seen = torch.randn(3, requires_grad=True), []
    value = x.exp()

    def again() -> Tensor:
        seen.append(current_backend())
        return x.detach().exp()

    with use_backend("triton", strict=True), recomputed((value, again)):
        out = value * x
    backward = threading.Thread(target=out.sum().backward)
    backward.start()
    backward.join()
    assert seen == [("triton", True)]
    assert current_backend().name == "auto"


def test_maps_of_a_node_come_again_from_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = GlobalPool(4, 4, bins=1, affine=False).double()
    node, x = MixedOp({"gp1": pool}), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    x.requires_grad_()
    z = torch.ones(1, dtype=torch.float64)
    ran, backend = [], Operation.backend

    def watched(self: Operation, arguments: tuple[object, ...]) -> str:
        name = backend(self, arguments)
        ran.append((self.name, name))
        return name

    monkeypatch.setattr(Operation, "backend", watched)
    with use_backend("triton"):
        out = node(z, x)
    ran.clear()
    out.square().sum().backward()
    assert ran == [("upsample", "triton")]


@pytest.fixture
def made() -> list[weakref.ref[torch.UntypedStorage]]:
    """Where the results of `doubled` lie."""
    return []


@pytest.fixture
def doubled(made: list[weakref.ref[torch.UntypedStorage]]) -> Callable[[Tensor], Tensor]:
    def double(x: Tensor) -> Tensor:
        y = 2 * x
        made.append(weakref.ref(y.untyped_storage()))
        return y

    return double


def test_a_shared_map_is_computed_again_once_and_not_held(doubled, made) -> None:
    x = torch.randn(3, requires_grad=True)

    def read_twice() -> Tensor:
        value, again = recomputable(doubled, x)
        with recomputed((value, again)):
            return value.square() + value.pow(3)

    out = read_twice()
    assert made[0]() is None
    (found,) = torch.autograd.grad(out.sum(), x)
    assert len(made) == 2 and made[1]() is None
    torch.testing.assert_close(found, 8 * x + 24 * x.square())


def test_a_shared_map_does_not_outlive_its_keepers_with_the_graph(doubled, made) -> None:
    """Parts of a network hold their graphs until what runs beside them is done."""
    x = torch.randn(3, requires_grad=True)
    value, again = recomputable(doubled, x)
    with recomputed((value, again)):
        out = value.square() + value.pow(3)
    del value
    for passes in (1, 2):
        (found,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        torch.testing.assert_close(found, 8 * x + 24 * x.square())
        assert len(made) > passes and not any(storage() for storage in made)
