"""Second stages of separable pairs: fused form against the reference, edge by edge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.kernels import normalised_depthwise as kernel
from lgcnet_fast.ops import explain, use_backend
from lgcnet_fast.ops import normalised_depthwise as registered
from lgcnet_fast.ops.second_stages import second_stages
from tests.combinations import some_combinations

BACKENDS = ["reference", "triton"]


class Edges:
    """Maps of `size`, norms and weights of some edges: 4 channels in, 3 out."""

    def __init__(
        self,
        count: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        stack: bool = True,
        size: tuple[int, int] = (5, 3),
    ) -> None:
        torch.manual_seed(0)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()

        maps = [leaf(2, *size, 4) for _ in range(count)]
        self.ys = [[y.movedim(-1, 1)[None] if stack else y.movedim(-1, 1)] for y in maps]
        self.norms = [nn.BatchNorm2d(4, affine=False).to(device) for _ in range(count)]
        if dtype == torch.float64:
            self.norms = [norm.double() for norm in self.norms]
        for norm in self.norms:
            norm.running_var.uniform_(0.5, 2)
        self.depthwise = [leaf(4, 1, 3, 3) for _ in range(count)]
        self.pointwise = [leaf(3, 4, 1, 1) for _ in range(count)]
        self.leaves = (*maps, *self.depthwise, *self.pointwise)

    def outcome(self, backend: str, autocast: bool = False, to_sum: bool = False) -> list[Tensor]:
        """Maps, gradients, states of the norms; norms are copied."""
        norms = [copy.deepcopy(norm) for norm in self.norms]
        device = self.depthwise[0].device.type
        with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
            found = second_stages(self.ys, norms, self.depthwise, self.pointwise, to_sum)
        maps = [y.view(2, 3, 5, 3) if y.ndim == 5 else y for (y,) in found]
        torch.manual_seed(1)
        g = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in maps]
        gradients = torch.autograd.grad(maps, self.leaves, g)
        states = [value for norm in norms for value in norm.state_dict().values()]
        return [*maps, *gradients, *states]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for ours, other in zip(found, wanted, strict=True):
        assert ours.dtype == other.dtype
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count, stack", [(1, True), (4, True), (2, False)])
def test_fused_equals_reference(
    count: int, stack: bool, training: bool, device: torch.device
) -> None:
    edges = Edges(count, device, stack=stack)
    for norm in edges.norms:
        norm.train(training)
    assert_same(edges.outcome("triton"), edges.outcome("reference"))


def test_edges_together_are_edges_alone(device: torch.device) -> None:
    edges = Edges(3, device)
    with use_backend("triton"):
        together = second_stages(edges.ys, edges.norms, edges.depthwise, edges.pointwise)
        for index, (wanted,) in enumerate(together):
            one = slice(index, index + 1)
            ((alone,),) = second_stages(
                edges.ys[one], edges.norms[one], edges.depthwise[one], edges.pointwise[one]
            )
            torch.testing.assert_close(alone, wanted)


def test_autocast(device: torch.device) -> None:
    edges = Edges(2, device)
    reference, fused = (edges.outcome(backend, autocast=True) for backend in BACKENDS)
    truth = edges.outcome("reference")
    assert fused[0].dtype == torch.bfloat16
    for ours, other, wanted in zip(fused, reference, truth, strict=True):
        assert ours.dtype == other.dtype
        error, allowed = ((t.double() - wanted).norm() for t in (ours, other))
        assert error <= 2 * allowed + 0.02 * wanted.double().norm()


def test_depthwise_maps_kept_or_made_again(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = Edges(2, device, torch.bfloat16)
    made: list[Tensor] = []
    make = kernel.normalised_depthwise

    def counted(*arguments: Any) -> Tensor:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(kernel, "normalised_depthwise", counted)
    kept = edges.outcome("triton", to_sum=True)
    assert len(made) == 1
    monkeypatch.setattr("lgcnet_fast.ops.fused_second_stages.SMALLEST", 0)
    again = edges.outcome("triton", to_sum=True)
    assert len(made) == 1 + 2
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_finite_differences(backend: str, device: torch.device) -> None:
    edges = Edges(2, device, torch.float64, size=(2, 3))

    def joined(*leaves: Tensor) -> Tensor:
        maps, depthwise, pointwise = leaves[:2], leaves[2:4], leaves[4:]
        ys = [[y.movedim(-1, 1)[None]] for y in maps]
        found = second_stages(ys, edges.norms, depthwise, pointwise)
        return torch.cat([y.flatten() for (y,) in found])

    with use_backend(backend):
        assert torch.autograd.gradcheck(joined, edges.leaves, fast_mode=True)


@some_combinations("form, training", [(True, True), (True, False), (False, False)], (True, False))
def test_registration(form: tuple[bool, bool], training: bool, device: torch.device) -> None:
    multiplied, kept = form
    ys = [y[0].detach() for (y,) in Edges(2, device, size=(3, 5)).ys]
    statistics = torch.rand(3, 2, 4, device=device) + 0.5
    windows = torch.randn(2, 3, 3, 4, device=device)
    torch.library.opcheck(registered.normalised_depthwise, (ys, windows, statistics))
    products = torch.randn(2, 3, 4, device=device) if multiplied else windows.new_empty(2, 0)
    channels = 3 if multiplied else 4
    gs = [torch.randn(1, 2, 3, 5, channels, device=device).movedim(-1, 2) for _ in ys]
    filtered = windows.new_empty(0)
    if kept:
        filtered = registered.normalised_depthwise(ys, windows, statistics)
    arguments = (gs, ys, windows, products, statistics, training, filtered)
    torch.library.opcheck(registered.normalised_depthwise_backward, arguments)


def test_raw_maps_are_all_that_is_kept(device: torch.device) -> None:
    edges = Edges(2, device)
    known = {y.untyped_storage().data_ptr() for (y,) in edges.ys}
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with use_backend("triton"), hooks:
        second_stages(edges.ys, edges.norms, edges.depthwise, edges.pointwise)
    others = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    weights = sum(w.numel() for w in (*edges.depthwise, *edges.pointwise))
    assert len(kept) - len(others) == 2
    assert sum(t.numel() for t in others) == weights + 3 * 2 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(backend: str) -> None:
    edges = Edges(2, torch.device("cpu"))
    with use_backend(backend):
        with pytest.raises(OperandError, match="ys: 2 maps, 1 norms for 2 edges"):
            second_stages(edges.ys, edges.norms[:1], edges.depthwise, edges.pointwise)
        with pytest.raises(OperandError, match="depthwise: 1 weights for 2 maps"):
            second_stages(edges.ys, edges.norms, edges.depthwise[:1], edges.pointwise)
        with pytest.raises(OperandError, match=r"pointwise\[1\]: shape"):
            pointwise = [edges.pointwise[0], edges.pointwise[1][:2]]
            second_stages(edges.ys, edges.norms, edges.depthwise, pointwise)


def test_affine_norms_are_refused(device: torch.device) -> None:
    edges = Edges(1, device)
    norms = [nn.BatchNorm2d(4).to(device)]
    with use_backend("triton"), pytest.raises(BackendError, match="affine"):
        second_stages(edges.ys, norms, edges.depthwise, edges.pointwise)
    arguments = (edges.ys[0], norms, edges.depthwise, edges.pointwise, False)
    assert "affine" in explain("second_stages", *arguments)["triton"]
