"""Parts side by side: what autograd sees is one operation, and nothing of the result changes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lgcnet_fast.nn.together
from lgcnet_fast.nn.cell import DerivedCell, SearchCell
from lgcnet_fast.nn.fusion import derived_fusion_cell, search_fusion_cell
from lgcnet_fast.nn.fusion_graphs import FUSION_GRAPHS
from lgcnet_fast.nn.together import Part, together
from lgcnet_fast.ops import recomputed, use_backend


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a capture, but for the streams."""
    monkeypatch.setattr(lgcnet_fast.nn.together, "lanes_of", lambda device: 2)
    return monkeypatch


def outcome(network: nn.Module, call: Callable[[nn.Module], Tensor], *inputs: Tensor):
    network = copy.deepcopy(network)
    out = call(network)
    torch.manual_seed(2)
    g = torch.randn_like(out)
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(out, [*inputs, *parameters.values()], g, allow_unused=True)
    return [out, *gradients, *network.buffers()]


def assert_nothing_changes(
    network: nn.Module, call: Callable[[nn.Module], Tensor], *inputs: Tensor
) -> None:
    found = outcome(network, call, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lgcnet_fast.nn.together, "lanes_of", lambda device: 1)
        wanted = outcome(network, call, *inputs)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            # Sums are taken in another order.
            assert (ours - theirs).double().norm() <= 1e-5 * theirs.double().norm() + 1e-6


def a_map(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize(
    "reduction, backend",
    [
        (False, "reference"),
        (True, "reference"),
        pytest.param(False, "triton", marks=pytest.mark.slow),
        pytest.param(True, "triton", marks=pytest.mark.slow),
    ],
)
def test_a_search_cell(beside: pytest.MonkeyPatch, reduction: bool, backend: str) -> None:
    torch.manual_seed(0)
    cell = SearchCell(3, 2, 2, reduction, reduce_first=reduction)
    s0 = a_map(2, 3, 4, 6) if reduction else a_map(2, 3, 2, 3)
    z = torch.rand(5, 8).softmax(1).requires_grad_()
    s1 = a_map(2, 2, 2, 3)
    with use_backend(backend):
        assert_nothing_changes(cell, lambda cell: cell(s0, s1, z), s0, s1, z)


def test_a_mixed_edge_of_kernels(beside: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    edge = SearchCell(2, 2, 2, reduction=False, reduce_first=False).edges[0]
    x, row = a_map(2, 2, 2, 3), torch.rand(8).softmax(0).requires_grad_()
    with use_backend("triton"):
        assert_nothing_changes(edge, lambda edge: edge(row, x), x, row)


def test_a_derived_cell(beside: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cell = DerivedCell(3, 4, 4, False, False, ["sep3", "conv3", "max3", "skip", "dil3_2"])
    s0, s1 = a_map(2, 3, 5, 6), a_map(2, 4, 5, 6)
    with use_backend("reference"):
        assert_nothing_changes(cell, lambda cell: cell(s0, s1), s0, s1)


@pytest.mark.parametrize("variant", sorted(FUSION_GRAPHS))
@pytest.mark.parametrize("searched", [True, False])
def test_a_fusion_cell(beside: pytest.MonkeyPatch, variant: str, searched: bool) -> None:
    torch.manual_seed(0)
    graph = FUSION_GRAPHS[variant]
    features = [a_map(2, 3, 6, 7), a_map(2, 4, 3, 4), a_map(2, 5, 2, 2)][: len(graph.inputs)]
    channels = [feature.shape[1] for feature in features]
    if searched:
        cell = search_fusion_cell(graph, channels)
        rows = {edge.name: torch.rand(10).requires_grad_() for edge in graph.op_edges}
        rows |= {edge.name: torch.rand(2).requires_grad_() for edge in graph.up_edges}
    else:
        choices = {edge.name: "sep3" for edge in graph.op_edges}
        choices |= {edge.name: "interp" for edge in graph.up_edges}
        cell, rows = derived_fusion_cell(graph, channels, choices), {}
    with use_backend("reference"):
        assert_nothing_changes(
            cell, lambda cell: cell(features, rows or None), *features, *rows.values()
        )


def test_autograd_sees_one_operation(beside: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, requires_grad=True)
    (a,), (b, c) = together([Part(lambda x: [x * 2], [x]), Part(lambda x: [x + 1, x - 1], [x])])
    assert a.grad_fn is b.grad_fn is c.grad_fn
    (gradient,) = torch.autograd.grad((a * b + c).sum(), x)
    assert torch.allclose(gradient, 4 * x + 3)


def test_a_part_may_hand_out_what_it_got_or_something_without_gradient(
    beside: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(3, requires_grad=True)
    (same,), (sign, cube) = together(
        [Part(lambda x: [x], [x]), Part(lambda x: [x.detach().sign(), x**3], [x])]
    )
    assert not sign.requires_grad or sign.grad_fn is cube.grad_fn
    (gradient,) = torch.autograd.grad((same + cube).sum(), x)
    assert torch.allclose(gradient, 1 + 3 * x**2)
    assert torch.equal(sign, x.sign())


def test_parameters_are_back_in_place_also_after_a_failure(beside: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2)
    own = layer.weight

    def fail(x: Tensor) -> list[Tensor]:
        assert layer.weight is not own and layer.weight.requires_grad
        raise RuntimeError("of the part")

    x = torch.randn(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="of the part"):
        together([Part(fail, [x], [layer]), Part(lambda x: [x], [x])])
    assert layer.weight is own


def test_gradients_reach_what_stands_in_for_parameters(beside: pytest.MonkeyPatch) -> None:
    """As autocast's copies, which the float32 parameters get their gradients from."""
    layer = nn.Linear(2, 2, bias=False)
    parameter = layer.weight
    layer._parameters["weight"] = parameter * 2
    x = torch.randn(3, 2, requires_grad=True)
    (a,), (b,) = together([Part(lambda x: [layer(x)], [x], [layer]), Part(lambda x: [x], [x])])
    (gradient,) = torch.autograd.grad((a.sum() + b.sum()), parameter)
    assert torch.allclose(gradient, 2 * x.sum(0).expand(2, 2))


def test_hooks_for_kept_tensors_see_those_of_the_parts(beside: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, requires_grad=True)
    value = x.detach().clone().requires_grad_()
    calls = []

    def again() -> Tensor:
        calls.append(1)
        return value.detach()

    with recomputed((value, again)):
        (a,), _ = together([Part(lambda y: [y * y], [value]), Part(lambda y: [y], [x])])
    assert calls == []
    (gradient,) = torch.autograd.grad(a.sum(), value)
    assert calls and torch.allclose(gradient, 2 * value)


def test_results_are_not_held(beside: pytest.MonkeyPatch) -> None:
    """Only what the parts keep: a result dies with its last reader."""
    x = torch.randn(3, requires_grad=True)
    (a,), (b,) = together([Part(lambda x: [x + 1], [x]), Part(lambda x: [x + 2], [x])])
    total = (a + b).sum()
    storage = weakref.ref(a.untyped_storage())
    del a
    gc.collect()
    assert storage() is None
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.equal(gradient, torch.full((3,), 2.0))


@pytest.mark.parametrize("lanes", [1, 2])
def test_jobs_beside_the_parts_run_before_it_returns(
    beside: pytest.MonkeyPatch, lanes: int
) -> None:
    beside.setattr(lgcnet_fast.nn.together, "lanes_of", lambda device: lanes)
    x, ran = torch.ones(2, requires_grad=True), []
    parts = [Part(lambda x: [2 * x], [x]), Part(lambda x: [3 * x], [x])]
    (first,), (second,) = together(parts, [lambda: ran.append(True)])
    (first + second).sum().backward()
    assert ran == [True] and torch.equal(x.grad, torch.full((2,), 5.0))


def test_without_gradients_the_parts_follow_each_other(beside: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        (a,), (b,) = together([Part(lambda x: [x + 1], [x]), Part(lambda x: [x + 2], [x])])
    assert a.grad_fn is None and torch.equal(b, x + 2)


def test_where_memory_is_spared_the_parts_follow_each_other(beside: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, requires_grad=True)
    parts = [Part(lambda x: [x + 1], [x]), Part(lambda x: [x + 2], [x])]
    (hidden,), _ = together(parts)
    beside.setattr(lgcnet_fast.nn.together, "spares", lambda x: x is parts[0].inputs[0])
    (plain,), _ = together(parts)
    assert "Together" in type(hidden.grad_fn).__name__
    assert "Add" in type(plain.grad_fn).__name__
