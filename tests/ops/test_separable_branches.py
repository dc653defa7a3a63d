"""Depthwise-separable branches: fused form against the reference, and that against one branch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.ops import fused_separable_branches as fused
from lgcnet_fast.ops import relu_depthwise_separable, separable_branches, use_backend
from lgcnet_fast.ops.fused_separable_branches import (
    depthwise_maps,
    separable_branches_backward,
    separable_maps,
    stacked_matrices,
    stacked_windows,
)
from lgcnet_fast.ops.pointwise_kernels import (
    cut,
    map_gradient_by_library,
    pointwise_gradients,
    weight_gradient_by_library,
)
from tests.combinations import some_cases

CPU = not torch.cuda.is_available()


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    c_out: int
    dilations: tuple[int, ...]
    stride: int = 1
    stacks: tuple[int, ...] | None = None
    edges: int = 1

    @property
    def branches(self) -> int:
        return self.edges * len(self.dilations)

    def build(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x in NHWC memory, depthwise and pointwise weights."""
        torch.manual_seed(0)
        images, channels, height, width = self.shape

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, dtype)

        depthwise = [leaf(channels, 1, 3, 3) for _ in range(self.branches)]
        pointwise = [leaf(self.c_out, channels, 1, 1) for _ in range(self.branches)]
        x = leaf(images, height, width, channels).movedim(-1, 1)
        for tensor in (x, *depthwise, *pointwise):
            tensor.requires_grad_()
        return x, depthwise, pointwise

    def __call__(self, x: Tensor, *weights: Tensor) -> list[list[Tensor]]:
        depthwise, pointwise = weights[: self.branches], weights[self.branches :]
        return separable_branches(x, depthwise, pointwise, self.dilations, self.stride, self.stacks)


CASES = [
    Case((2, 3, 5, 7), 3, (1, 2, 4, 8), stacks=(1, 3, 1, 3), edges=2),
    Case((1, 6, 6, 5), 2, (1, 2, 4, 8, 12)),
    Case((2, 5, 7, 4), 5, (1, 2, 4, 8), stride=2, stacks=(1, 3, 1, 3), edges=2),
    Case((2, 17, 3, 5), 4, (1,)),
    Case((2, 4, 6, 6), 3, (1,), stride=2),
    Case((1, 2, 5, 5), 3, (2,), stride=2),
    Case((1, 3, 1, 1), 1, (1, 2, 3, 4, 5, 6, 7), stride=2, stacks=(3, 4)),
    Case((2, 3, 4, 3), 2, (1, 2), stacks=(1, 1, 2, 1, 1, 1, 1), edges=4),
    Case((1, 2, 3, 5), 3, (2, 1), stride=2, edges=3),
    Case((2, 3, 5, 7), 3, (4, 1, 2), stacks=(1, 1, 1)),
    Case((1, 4, 5, 4), 2, (2, 2, 8), stride=2, stacks=(1, 1, 1)),
]


def flat(stacks: list[list[Tensor]]) -> list[Tensor]:
    return [y for stack in stacks for z in stack for y in (z.unbind() if z.ndim == 5 else [z])]


def results(case: Case, inputs: list[Tensor], backend: str, autocast: bool = False) -> list[Tensor]:
    """Maps of all branches, and gradients of x and all weights."""
    device = inputs[0].device.type
    with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
        maps = flat(case(*inputs))
    torch.manual_seed(1)
    gradients = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in maps]
    return [*maps, *torch.autograd.grad(maps, inputs, gradients)]


def assert_as_good(found: list[Tensor], other: list[Tensor], truth: list[Tensor]) -> None:
    """Of the same dtypes, and about as close to the truth as the reference."""
    for a, b, wanted in zip(found, other, truth, strict=True):
        assert a.dtype == b.dtype
        error, other_error = ((t.double() - wanted).norm() for t in (a, b))
        assert error <= 1.5 * other_error + 2e-3 * wanted.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_one_branch_after_the_other(case: Case) -> None:
    x, depthwise, pointwise = case.build(torch.device("cpu"))
    maps = flat(case(x, *depthwise, *pointwise))
    assert len(maps) == case.branches
    for branch, y in enumerate(maps):
        dilation = case.dilations[branch % len(case.dilations)]
        weights = depthwise[branch], pointwise[branch]
        assert torch.equal(y, relu_depthwise_separable(x, *weights, case.stride, dilation))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_equals_reference(case: Case, device: torch.device) -> None:
    x, depthwise, pointwise = case.build(device)
    inputs = [x, *depthwise, *pointwise]
    reference, fused = (results(case, inputs, backend) for backend in ("reference", "triton"))
    for found, wanted in zip(fused, reference, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@some_cases("case", CASES, 0, 2, 3)
def test_stacks_are_dense_nhwc_and_gradients_fit_their_parameters(
    case: Case, device: torch.device
) -> None:
    x, depthwise, pointwise = case.build(device)
    with use_backend("triton"):
        stacks = case(x, *depthwise, *pointwise)
    counts = case.stacks or [len(case.dilations)] * case.edges
    assert [y.shape[0] for (y,) in stacks] == list(counts)
    assert all(y.movedim(-3, -1).is_contiguous() for (y,) in stacks)
    sum(y.square().sum() for (y,) in stacks).backward()
    # Otherwise each parameter would cost a copy of its gradient.
    for weight in (*depthwise, *pointwise):
        assert weight.grad.is_contiguous()


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_autocast(case: Case, device: torch.device) -> None:
    x, depthwise, pointwise = case.build(device)
    inputs = [x, *depthwise, *pointwise]
    precise = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = results(case, precise, "reference")
    reference = results(case, inputs, "reference", autocast=True)
    fused = results(case, inputs, "triton", autocast=True)
    assert fused[0].dtype == torch.bfloat16 and fused[-1].dtype == torch.float32
    assert_as_good(fused, reference, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[2]
    x, depthwise, pointwise = case.build(device, dtype)
    inputs = [x, *depthwise, *pointwise]
    precise = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = results(case, precise, "reference")
    reference, fused = (results(case, inputs, backend) for backend in ("reference", "triton"))
    assert_as_good(fused, reference, truth)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_by_finite_differences(stride: int, backend: str, device: torch.device) -> None:
    case = Case((1, 2, 2, 3), 1, (1, 2), stride, stacks=(1, 1, 2), edges=2)
    x, depthwise, pointwise = case.build(device, torch.float64)

    def joined(*inputs: Tensor) -> Tensor:
        return torch.cat(flat(case(*inputs)))

    with use_backend(backend):
        inputs = (x, *depthwise, *pointwise)
        assert torch.autograd.gradcheck(joined, inputs, fast_mode=True)


def test_a_stack_that_nothing_reads(device: torch.device) -> None:
    case = CASES[0]
    x, depthwise, pointwise = case.build(device)
    inputs = [x, *depthwise, *pointwise]
    gradients = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            used = case(*inputs)[1]
        total = sum(y.square().sum() for y in used)
        gradients.append(torch.autograd.grad(total, inputs, materialize_grads=True))
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_kept_maps_give_the_same_gradients(
    stride: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second backward pass finds them overwritten, and makes them again."""
    case = Case((1, 4, 3, 5), 3, (1, 2), stride=stride)
    x, depthwise, pointwise = case.build(device, torch.bfloat16)
    leaves = [x, *depthwise, *pointwise]
    found = []
    for fewest in (64, 1):
        monkeypatch.setattr(fused, "FEWEST", fewest)
        monkeypatch.setattr(fused, "SMALLEST", 1)
        with use_backend("triton"):
            maps = separable_branches(x, depthwise, pointwise, (1, 2), stride)
            total = sum(y.float().square().sum() for (y,) in maps)
            found += [torch.autograd.grad(total, leaves, retain_graph=again) for again in (1, 0)]
    for gradients in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0], strict=True))


def test_same_inputs_same_bits(device: torch.device) -> None:
    # The interpreter runs programs one by one: only memory that nobody wrote can differ.
    case = CASES[8 if CPU else 0]
    x, depthwise, pointwise = case.build(device)
    once, twice = (results(case, [x, *depthwise, *pointwise], "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_registration(device: torch.device) -> None:
    case = Case((1, 2, 3, 4), 3, (1, 2), edges=2)
    x, *weights = case.build(device)
    x, (depthwise, pointwise) = x.detach(), ([w.detach() for w in group] for group in weights)
    weights = stacked_windows(depthwise), stacked_matrices(pointwise, x)
    for stride in (1, 2):
        settings = ([1, 2], stride, "triton")
        torch.library.opcheck(depthwise_maps, (x, weights[0], *settings))
        filtered, edges = separable_maps(x, *weights, *settings)
        stacks = [torch.ones_like(edge) for edge in edges]
        torch.library.opcheck(
            separable_branches_backward, (stacks, filtered, x, *weights, *settings)
        )


@some_cases("case", (CASES[0], CASES[7], CASES[8]), 1, 2)
def test_products_of_a_library_do_as_well(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, depthwise, pointwise = case.build(device, torch.float64 if CPU else torch.float32)
    inputs = [x, *depthwise, *pointwise]
    found = []
    for served in (False, True):
        monkeypatch.setattr(
            "lgcnet_fast.kernels.pointwise_backward.serves", lambda x, out, served=served: served
        )
        found.append(results(case, inputs, "triton"))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "images, height, width, parts",
    [
        (16, 64, 128, 128),
        (16, 16, 32, 16),
        (16, 193, 193, 386),
        (1, 193, 385, 55),
        (2, 49, 97, 7),
        (3, 1, 1, 3),
        (1, 193, 193, 36),
        (1, 97, 193, 18),
        (1, 1, 2053, 2),
        (1, 1, 1031, 1),
    ],
)
def test_parts_of_a_weight_gradient_are_long_and_many(
    images: int, height: int, width: int, parts: int
) -> None:
    found, length = cut(images, images * height * width)
    left_over = images * height * width - found * length
    assert found == parts and 0 <= left_over < parts and length >= min(1024, height * width)


@pytest.mark.parametrize("branches", [1, 3])
def test_positions_that_no_number_divides_all_count(branches: int) -> None:
    torch.manual_seed(0)
    size = (2, 1, 5003)
    g, maps = (
        torch.randn(branches, *size, channels, dtype=torch.float64).movedim(-1, 2)
        for channels in (3, 5)
    )
    weights, kept = torch.randn(branches, 3, 5, dtype=torch.float64), maps.clone()
    d_weights = pointwise_gradients("cuda", [g], maps, weights)()
    torch.testing.assert_close(d_weights, torch.einsum("bnohw,bnchw->boc", g, kept))
    torch.testing.assert_close(maps, torch.einsum("bnohw,boc->bnchw", g, weights))


def test_the_weight_gradient_of_one_product_counts_what_is_left_over() -> None:
    torch.manual_seed(0)
    g, x = (torch.randn(3, 1, 5003, c, dtype=torch.float64).movedim(-1, 1) for c in (4, 5))
    weight = torch.randn(4, 5, dtype=torch.float64)
    dx, dw = map_gradient_by_library(g, weight), weight_gradient_by_library(g, x)
    torch.testing.assert_close(dw, torch.einsum("nohw,nchw->oc", g, x))
    torch.testing.assert_close(dx, torch.einsum("nohw,oc->nchw", g, weight))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.rand(3, 5, 7)}, "x: shape"),
        ({"x": torch.rand(0, 3, 5, 7)}, "x: empty"),
        ({"x": torch.ones(2, 3, 5, 7, dtype=torch.uint8)}, "x: dtype"),
        ({"stride": 3}, "stride: 3, need 1 or 2"),
        ({"dilations": ()}, "dilations: 0 of them"),
        ({"dilations": (1, 0)}, r"dilations: \(1, 0\), each must be 1 to 255"),
        ({"dilations": (1, 2, 3)}, "depthwise: 2 weights for 1 maps and 3 dilations"),
        ({"depthwise": []}, "depthwise: 0 weights"),
        ({"pointwise": [torch.rand(4, 3, 1, 1)]}, "pointwise: 1 weights for 2 branches"),
        ({"pointwise": [torch.rand(4, 5, 1, 1)] * 2}, r"pointwise\[0\]: shape"),
        ({"depthwise": [torch.rand(3, 1, 5, 5)] * 2}, r"depthwise\[0\]: shape"),
        ({"depthwise": [torch.rand(3, 1, 3, 3).double()] * 2}, r"depthwise\[0\]: torch.float64"),
        ({"stacks": (1,)}, r"stacks: \(1,\) do not divide edges of 2 branches"),
        ({"stacks": (2, 1)}, r"stacks: \(2, 1\) do not divide 2 branches"),
        ({"dilations": (1,), "stacks": (2,)}, "do not divide edges of 1 branches"),
        ({"stacks": (2, 0)}, "stacks"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str, backend: str) -> None:
    x, depthwise, pointwise = Case((2, 3, 5, 7), 4, (1, 2)).build(torch.device("cpu"))
    arguments = {"x": x, "depthwise": depthwise, "pointwise": pointwise, "dilations": (1, 2)}
    with use_backend(backend), pytest.raises(OperandError, match=message):
        separable_branches(**(arguments | change))


def test_an_exotic_dtype_is_refused(device: torch.device) -> None:
    x, depthwise, pointwise = (
        torch.rand(shape, device=device).to(torch.float8_e4m3fn)
        for shape in ((1, 2, 3, 3), (2, 1, 3, 3), (2, 2, 1, 1))
    )
    with use_backend("triton"), pytest.raises(BackendError, match="x is torch.float8_e4m3fn"):
        separable_branches(x, [depthwise], [pointwise], (1,))
