"""The mixed node: fused form against the reference, and both against the definition."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.ops import explain, mixed_norm_sum, normalised, use_backend
from lgcnet_fast.ops.fused_mixed_norm_sum import _batch_statistics, mixed_sum


def random_map(*shape: int, dtype: torch.dtype = torch.float32, device: object = "cpu") -> Tensor:
    """(..., C, H, W) in NHWC memory, with a mean of 1."""
    *outer, channels, height, width = shape
    values = torch.randn(*outer, height, width, channels, dtype=torch.float64) + 1
    return values.to(device, dtype).movedim(-1, -3)


@dataclass(frozen=True)
class Case:
    """Entries of ys: the number of a stack's maps, 1 for a map, 0 for a plain one."""

    entries: tuple[int, ...]
    shape: tuple[int, int, int, int] = (2, 3, 5, 7)
    options: tuple[int, ...] | None = None
    weights: int = 0
    dtype: torch.dtype = torch.float32

    def build(self, device: torch.device) -> tuple[list[Tensor], Tensor, list[nn.Module | None]]:
        torch.manual_seed(0)
        ys = [
            random_map(*([count] if count > 1 else []), *self.shape, dtype=self.dtype)
            for count in self.entries
        ]
        norms: list[nn.Module | None] = []
        for count in self.entries:
            norms += [self._norm() for _ in range(count)] or [None]
        z = torch.rand(self.weights or len(norms), dtype=self._precise())
        moved = [y.to(device).requires_grad_() for y in ys]
        return moved, z.to(device).requires_grad_(), [n and n.to(device) for n in norms]

    def _precise(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _norm(self) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(self.shape[1], affine=False).to(self._precise())
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        return norm


CASES = [
    Case((1,)),
    Case((1, 0)),
    Case((1, 0, 1, 1, 3), options=(0, 1, 2, 4, 5, 6, 7), weights=9),
    Case((2, 0, 3, 0), shape=(1, 17, 3, 1)),
    Case((0, 2), options=(1, 0, 4), weights=5, shape=(2, 1, 1, 1)),
]


def results(
    ys: Sequence[Tensor],
    z: Tensor,
    norms: Sequence[nn.Module | None],
    options: Sequence[int] | None,
    backend: str,
) -> list[Tensor]:
    """Sum, gradients of every entry of ys and of z, states of the norms; norms are copied."""
    norms = [copy.deepcopy(norm) for norm in norms]
    with use_backend(backend):
        out = mixed_norm_sum(ys, z, norms, options)
    torch.manual_seed(1)
    g = random_map(*out.shape, dtype=out.dtype, device=out.device)
    gradients = torch.autograd.grad(out, [*ys, z], g)
    states = [value for norm in norms if norm for value in norm.state_dict().values()]
    return [out, *gradients, *states]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_equals_reference(case: Case, training: bool, device: torch.device) -> None:
    ys, z, norms = case.build(device)
    for norm in norms:
        if norm is not None:
            norm.train(training)
    reference = results(ys, z, norms, case.options, "reference")
    fused = results(ys, z, norms, case.options, "triton")
    # Two values a channel, which may lie close together, make r large.
    slack = 20 if case.shape[0] * case.shape[2] * case.shape[3] < 4 else 1
    for found, wanted in zip(fused, reference, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-4 * slack, atol=2e-5 * slack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_the_reference(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = Case((1, 0, 3), dtype=dtype)
    ys, z, norms = case.build(device)
    precise = [y.detach().double().requires_grad_() for y in ys]
    doubles = [norm and copy.deepcopy(norm).double() for norm in norms]
    truth = results(precise, z.detach().double().requires_grad_(), doubles, None, "reference")
    reference = results(ys, z, norms, None, "reference")
    fused = results(ys, z, norms, None, "triton")
    for found, other, wanted in zip(fused, reference, truth, strict=True):
        assert found.dtype == other.dtype
        error, other_error = ((t.double() - wanted).norm() for t in (found, other))
        assert error <= 1.5 * other_error + 1e-3 * wanted.double().norm()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_by_finite_differences(backend: str, device: torch.device) -> None:
    case = Case((1, 0, 2), (2, 2, 2, 3), options=(3, 0, 1, 4), weights=5, dtype=torch.float64)
    ys, z, norms = case.build(device)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda z, *ys: mixed_norm_sum(ys, z, norms, case.options), (z, *ys), fast_mode=True
        )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equals_the_definition(backend: str, device: torch.device) -> None:
    case = Case((1, 0, 2), dtype=torch.float64)
    ys, z, norms = case.build(device)
    terms = [nn.functional.batch_norm(y, None, None, training=True) for y in (ys[0], *ys[2])]
    expected = z[0] * terms[0] + z[1] * ys[1] + z[2] * terms[1] + z[3] * terms[2]
    with use_backend(backend):
        torch.testing.assert_close(mixed_norm_sum(ys, z, norms), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dims", [4, 5])
def test_normalised_in_front_of_a_function(
    dims: int, backend: str, training: bool, device: torch.device
) -> None:
    (y,), _, (norm,) = Case((1,)).build(device)
    norm.train(training)
    twin = copy.deepcopy(norm)
    w = torch.randn(y.shape[1], 1, 1, device=device, requires_grad=True)
    with use_backend(backend):
        out = normalised([y[None] if dims == 5 else y], norm, lambda x: (x * w).square())
    wanted = (twin(y) * w).square()
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad(o.square().mean(), (y, w)) for o in (out, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())


def test_normalised_map_is_not_kept(device: torch.device) -> None:
    (y,), _, (norm,) = Case((1,)).build(device)
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x.untyped_storage()))
        return x * x

    for backend, kept in (("reference", True), ("triton", False)):
        with use_backend(backend):
            out = normalised([y], norm, watched)
        gc.collect()
        assert (seen.pop()() is not None) is kept
        del out


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_one_hot_and_zero_weights(backend: str, device: torch.device) -> None:
    """Soft weights of a cold softmax: exact zeros give nothing, also to the gradient."""
    ys, _, norms = Case((1, 2, 0)).build(device)
    for row in (torch.eye(4)[1], torch.zeros(4)):
        z = row.to(device).requires_grad_()
        out, *dys, dz = results(ys, z, norms, None, backend)[: len(ys) + 2]
        if not row.any():
            assert (out == 0).all()
        assert (dys[0] == 0).all() and (dys[2] == 0).all() and dz.isfinite().all()


def test_maps_in_nchw_memory_are_served(device: torch.device) -> None:
    (y, x), z, norms = Case((1, 0)).build(device)
    with use_backend("triton"):
        wanted = mixed_norm_sum([y, x], z, norms)
        found = mixed_norm_sum([y.contiguous(), x.contiguous()], z, norms)
    assert torch.equal(found, wanted)


def test_same_inputs_same_bits(device: torch.device) -> None:
    ys, z, norms = CASES[2].build(device)
    once, twice = (results(ys, z, norms, CASES[2].options, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_registration(device: torch.device) -> None:
    ys, z, _ = Case((1, 2), (1, 2, 2, 2)).build(device)
    (x,), _, _ = Case((0,), (1, 2, 2, 2)).build(device)
    statistics = _batch_statistics([y.detach() for y in ys], 1e-5, 0, "triton")
    weights = torch.rand(4, device=device, requires_grad=True)
    torch.library.opcheck(_batch_statistics, ([y.detach() for y in ys], 1e-5, 0, "triton"))
    for training in (True, False):
        torch.library.opcheck(mixed_sum, (ys, [x], weights, statistics, training, "triton"))


def test_gradients_only_where_wanted(device: torch.device) -> None:
    ys, z, norms = Case((1, 0)).build(device)
    with use_backend("triton"):
        out = mixed_norm_sum([y.detach() for y in ys], z, norms)
        (dz,) = torch.autograd.grad(out.square().sum(), z)
        assert (dz != 0).all()
        out = mixed_norm_sum(ys, z.detach(), norms)
        assert len(torch.autograd.grad(out.square().sum(), ys)) == 2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"ys": []}, "ys: no maps"),
        ({"z": torch.tensor([0.5, NAN])}, r"z: weights must be finite, got \[0.5, nan\]"),
        ({"z": torch.tensor([INF, 1.0])}, "z: weights must be finite"),
        ({"z": torch.rand(2, 2)}, r"z: need a float vector, .* \(2, 2\)"),
        ({"z": torch.arange(2)}, "z: need a float vector, got torch.int64"),
        ({"z": torch.rand(1)}, "options: 1 is no position in z of 1"),
        ({"norms": [None]}, "norms: 1 for 2 maps"),
        ({"options": [0]}, "options: 1 for 2 maps"),
        ({"options": [0, -1]}, "options: -1"),
        ({"ys": [torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 6)]}, "ys, map 1: shape"),
        ({"ys": [torch.rand(0, 3, 5, 7)] * 2}, "ys, map 0: empty"),
        ({"ys": [torch.rand(3, 5, 7)] * 2}, "ys, map 0: shape"),
        ({"ys": [torch.ones(2, 3, 5, 7, dtype=torch.int32)] * 2}, "ys, map 0: dtype"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str, backend: str) -> None:
    ys, z, norms = Case((1, 0)).build(torch.device("cpu"))
    arguments = {"ys": ys, "z": z, "norms": norms, "options": None} | change
    with use_backend(backend), pytest.raises(OperandError, match=message):
        mixed_norm_sum(**arguments)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_single_value_a_channel_has_no_variance(backend: str, device: torch.device) -> None:
    ys, z, norms = Case((1,), (1, 3, 1, 1)).build(device)
    with use_backend(backend), pytest.raises(ValueError, match="value.* (per|a) channel"):
        mixed_norm_sum(ys, z, norms)
    norms[0].eval()
    with use_backend(backend):
        assert mixed_norm_sum(ys, z, norms).shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    "norm, reason",
    [
        (nn.SyncBatchNorm(3, affine=False), "SyncBatchNorm, whose statistics the ranks share"),
        (nn.BatchNorm2d(3), "affine"),
        (nn.BatchNorm2d(3, affine=False, momentum=None), "momentum"),
        (nn.BatchNorm2d(3, affine=False, track_running_stats=False), "running statistics"),
        (nn.BatchNorm2d(3, affine=False, eps=1e-3), "differ in .training, eps, momentum."),
        (nn.BatchNorm2d(3, affine=False).eval(), "differ in .training"),
        (nn.BatchNorm2d(3, affine=False).double(), "running statistics are torch.float64"),
        (nn.BatchNorm2d(4, affine=False), "4 channels, the maps have 3"),
        (nn.Identity(), "Identity"),
    ],
    ids=str,
)
def test_what_the_kernels_refuse(norm: nn.Module, reason: str, device: torch.device) -> None:
    ys, z, norms = Case((1, 1)).build(device)
    norms = [norms[0], norm.to(device)]
    with use_backend("triton"), pytest.raises(BackendError, match=reason):
        mixed_norm_sum(ys, z, norms)
    assert re.search(reason, explain("mixed_norm_sum", ys, z, norms, (0, 1))["triton"])


def test_mixed_dtypes_and_unnormalised_sums_are_refused(device: torch.device) -> None:
    ys, z, norms = Case((1, 0)).build(device)
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"ys\[1\] is torch.bfloat16, ys\[0\] is"):
            mixed_norm_sum([ys[0], ys[1].bfloat16()], z, norms)
        with pytest.raises(BackendError, match="no batch norm"):
            mixed_norm_sum(ys, z, [None, None])
        with pytest.raises(BackendError, match="None for a map of a stack"):
            mixed_norm_sum([torch.stack([ys[0], ys[1]])], z, norms)


def test_normalised_takes_one_map(device: torch.device) -> None:
    ys, _, norms = Case((2,)).build(device)
    with pytest.raises(OperandError, match="ys: 2 maps, need one"):
        normalised(ys, norms[0], torch.relu)
    with use_backend("triton"), pytest.raises(BackendError, match="affine"):
        normalised([ys[0][0]], nn.BatchNorm2d(3).to(device), torch.relu)
