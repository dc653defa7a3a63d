"""The node of a derived network: fused form against the reference, in double precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.errors import OperandError
from lgcnet_fast.ops import gathered_running_statistics, norm_sum, use_backend
from lgcnet_fast.ops.fused_affine_norm_sum import affine_sum, fits
from lgcnet_fast.ops.fused_mixed_norm_sum import _batch_statistics

Norms = list[nn.Module | None]


def random_map(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(..., C, H, W) in NHWC memory, with a mean of 1."""
    *outer, channels, height, width = shape
    values = torch.randn(*outer, height, width, channels, dtype=torch.float64) + 1
    return values.to(dtype).movedim(-1, -3)


@dataclass(frozen=True)
class Case:
    """Entries of ys: the number of a stack's maps, 1 for a map, 0 for a plain one."""

    entries: tuple[int, ...]
    shape: tuple[int, int, int, int] = (2, 3, 5, 7)

    def build(
        self, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> tuple[list[Tensor], Norms]:
        torch.manual_seed(0)
        ys = [
            random_map(*([count] if count > 1 else []), *self.shape, dtype=dtype)
            for count in self.entries
        ]
        norms: Norms = []
        for count in self.entries:
            norms += [self._norm(dtype).to(device) for _ in range(count)] or [None]
        return [y.to(device).requires_grad_() for y in ys], norms

    def _norm(self, dtype: torch.dtype) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(self.shape[1])
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        with torch.no_grad():
            norm.weight[0] = 0
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        return norm.double() if dtype == torch.float64 else norm


CASES = [
    Case((1,)),
    Case((1, 0)),
    Case((1, 1), (1, 1, 1, 3)),
    Case((0, 1, 1, 0, 1), (1, 17, 3, 1)),
    Case((1, 3)),
    Case((1, 1, 1, 1, 1), (2, 5, 1, 2)),
    Case((0,)),
    Case((0, 0)),
]


def results(ys: Sequence[Tensor], norms: Norms, backend: str) -> list[Tensor]:
    """Sum, gradients of ys and of the norms' parameters, states of the norms; these are copied."""
    norms = [copy.deepcopy(norm) for norm in norms]
    kept = [norm for norm in norms if norm is not None]
    with use_backend(backend), gathered_running_statistics():
        out = norm_sum(ys, norms)
    parameters = [parameter for norm in kept for parameter in norm.parameters()]
    torch.manual_seed(1)
    g = random_map(*out.shape, dtype=out.dtype).to(out.device)
    gradients = torch.autograd.grad(out, [*ys, *parameters], g)
    return [out, *gradients, *(value for norm in kept for value in norm.state_dict().values())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_equals_reference(case: Case, training: bool, device: torch.device) -> None:
    ys, norms = case.build(device)
    for norm in norms:
        if norm is not None:
            norm.train(training)
    reference, fused = (results(ys, norms, backend) for backend in ("reference", "triton"))
    for found, wanted in zip(fused, reference, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_the_reference(
    dtype: torch.dtype, device: torch.device
) -> None:
    ys, norms = Case((1, 0, 1), (2, 17, 9, 7)).build(device, dtype)
    precise = [y.detach().double().requires_grad_() for y in ys]
    doubles = [copy.deepcopy(norm).double() if norm else None for norm in norms]
    truth = results(precise, doubles, "reference")
    reference, fused = (results(ys, norms, backend) for backend in ("reference", "triton"))
    for found, other, wanted in zip(fused, reference, truth, strict=True):
        assert found.dtype == other.dtype
        error, other_error = ((t.double() - wanted).norm() for t in (found, other))
        assert error <= 1.5 * other_error + 1e-3 * wanted.double().norm()


def test_gradients_are_those_of_the_definition(device: torch.device) -> None:
    ys, norms = Case((1, 0, 2), (2, 2, 2, 3)).build(device)
    parameters = [parameter for norm in norms if norm for parameter in norm.parameters()]

    def call(*operands: Tensor) -> Tensor:
        return norm_sum(operands[: len(ys)], norms)

    with use_backend("triton"):
        assert torch.autograd.gradcheck(call, (*ys, *parameters), fast_mode=True)


def test_parameters_of_a_node_share_no_gradient(device: torch.device) -> None:
    """Whoever scales the gradients in place must not scale those of the betas twice."""
    ys, norms = Case((1, 1, 1)).build(device)
    with use_backend("triton"):
        norm_sum(ys, norms).square().sum().backward()
    gradients = [parameter.grad for norm in norms for parameter in norm.parameters()]
    before = [gradient.clone() for gradient in gradients]
    torch._foreach_mul_(gradients, 2)
    assert all(torch.equal(g, 2 * b) for g, b in zip(gradients, before, strict=True))


def test_registration(device: torch.device) -> None:
    ys, norms = Case((1, 2), (1, 2, 2, 2)).build(device)
    x = random_map(1, 2, 2, 2).to(device).requires_grad_()
    statistics = _batch_statistics([y.detach() for y in ys], 1e-5, 1, "triton")
    weights = [norm.weight for norm in norms], [norm.bias for norm in norms]
    torch.library.opcheck(affine_sum, (ys, [x], *weights, statistics))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3).double().eval(),
        nn.BatchNorm2d(3, affine=False).double(),
        nn.BatchNorm2d(3, momentum=None).double(),
        nn.BatchNorm2d(3, track_running_stats=False).double(),
        nn.BatchNorm2d(3, eps=1e-3).double(),
        nn.InstanceNorm2d(3).double(),
    ],
    ids=str,
)
def test_other_norms_are_pytorchs(norm: nn.Module, device: torch.device) -> None:
    ys, norms = Case((1, 1)).build(device)
    norms = [norms[0], norm.to(device)]
    assert not fits("triton", ys, norms)
    reference, fused = (results(ys, norms, backend) for backend in ("reference", "triton"))
    assert all(torch.equal(a, b) for a, b in zip(reference, fused, strict=True))


def test_synchronised_norms_and_those_of_the_cuda_backend_are_pytorchs() -> None:
    ys, norms = Case((1,)).build(torch.device("cpu"))
    assert fits("triton", ys, norms) and not fits("cuda", ys, norms)
    assert not fits("triton", ys, [nn.SyncBatchNorm(3).double()])


def test_same_inputs_same_bits(device: torch.device) -> None:
    ys, norms = CASES[3].build(device)
    once, twice = (results(ys, norms, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_arguments_are_named(backend: str) -> None:
    ys, norms = Case((1, 0)).build(torch.device("cpu"))
    with use_backend(backend):
        with pytest.raises(OperandError, match="ys: no maps"):
            norm_sum([], [])
        with pytest.raises(OperandError, match="norms: 1 for 2 maps"):
            norm_sum(ys, norms[:1])
        with pytest.raises(OperandError, match="ys, map 1: shape"):
            norm_sum([ys[0], ys[1][..., :-1]], norms)
        with pytest.raises(ValueError, match="value.* (per|a) channel"):
            norm_sum([random_map(1, 3, 1, 1)], norms[:1])
