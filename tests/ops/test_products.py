"""Products that are left to the node: fused form against the maps multiplied out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.errors import BackendError, OperandError
from lgcnet_fast.kernels import product_sum as kernel
from lgcnet_fast.ops import (
    Products,
    fused_second_stages,
    mixed_norm_sum,
    products,
    separable_branches,
    use_backend,
)
from lgcnet_fast.ops import fused_depthwise_branches as branches
from lgcnet_fast.ops import fused_product_sum as fused
from lgcnet_fast.ops.backend import suppose
from lgcnet_fast.ops.fused_separable_branches import stacked_matrices, stacked_windows
from lgcnet_fast.ops.second_stages import second_stages
from tests.combinations import some_combinations

RAW, PLAIN = 0, -1
CPU = not torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("without_tf32")


@pytest.fixture
def left_to_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of maps of any size and dtype."""
    for module in (branches, fused_second_stages):
        monkeypatch.setattr(module, "pay", lambda *arguments: True)


def random_map(*shape: int, dtype: torch.dtype, device: torch.device, mean: float = 1.0) -> Tensor:
    """(..., C, H, W) in NHWC memory."""
    *outer, channels, height, width = shape
    values = torch.randn(*outer, height, width, channels, dtype=torch.float64) + mean
    return values.to(device, dtype).movedim(-1, -3)


@dataclass(frozen=True)
class Node:
    """Entries: how many products a stack has, RAW for a raw map, PLAIN for a plain one."""

    entries: tuple[int, ...]
    shape: tuple[int, int, int, int] = (2, 3, 5, 7)
    """Of the depthwise maps."""
    c_out: int = 4
    options: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    mean: float = 1.0

    def build(self, device: torch.device, training: bool = True) -> Built:
        torch.manual_seed(0)
        images, channels, height, width = self.shape
        raw = (images, self.c_out, height, width)
        kind = {"dtype": self.dtype, "device": device, "mean": self.mean}
        maps, weights, norms = [], [], []
        for count in self.entries:
            maps.append(random_map(*((count, *self.shape) if count > 0 else raw), **kind))
            shape = (self.c_out, channels, 1, 1)
            weights += [
                (torch.randn(shape, dtype=torch.float64) / channels**0.5).to(device, self.dtype)
                for _ in range(max(count, 0))
            ]
            norms += [self._norm(device, training) for _ in range(max(count, 1))]
            if count == PLAIN:
                norms[-1] = None
        size = max(self.options or (len(norms) - 1,)) + 1
        precise = torch.float64 if self.dtype == torch.float64 else torch.float32
        z = torch.rand(size, dtype=precise).to(device)
        for tensor in (*maps, *weights, z):
            tensor.requires_grad_()
        return Built(self, maps, weights, z, norms)

    def _norm(self, device: torch.device, training: bool) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(self.c_out, affine=False)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        precise = torch.float64 if self.dtype == torch.float64 else torch.float32
        return norm.to(device, precise).train(training)


@dataclass
class Built:
    node: Node
    maps: list[Tensor]
    weights: list[Tensor]
    z: Tensor
    norms: list[nn.Module | None]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.z, *self.maps, *self.weights]

    def entries(self, maps: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Products | Tensor]:
        rest = iter(weights)
        return [
            Products(y, [next(rest) for _ in range(count)]) if count > 0 else y
            for y, count in zip(maps, self.node.entries, strict=True)
        ]

    def sum(self, z: Tensor, *others: Tensor, norms: Sequence[nn.Module | None] = ()) -> Tensor:
        maps, weights = others[: len(self.maps)], others[len(self.maps) :]
        entries = self.entries(maps, weights)
        return mixed_norm_sum(entries, z, norms or self.norms, self.node.options)

    def outcome(self, backend: str) -> list[Tensor]:
        """Sum, gradients of z, maps and weights, states of the norms; norms are copied."""
        norms = copy.deepcopy(self.norms)
        with use_backend(backend):
            out = self.sum(*self.leaves, norms=norms)
        torch.manual_seed(1)
        g = random_map(*out.shape, dtype=out.dtype, device=out.device)
        gradients = torch.autograd.grad(out, self.leaves, g)
        states = [value for norm in norms if norm for value in norm.state_dict().values()]
        return [out, *gradients, *states]


NODES = [
    Node((1,)),
    Node((3, RAW, 1, PLAIN, RAW, 2, PLAIN)),
    Node((2, PLAIN), shape=(1, 17, 3, 1), c_out=5),
    Node((RAW, 2), shape=(2, 2, 4, 3), c_out=19, options=(4, 0, 2)),
    Node((PLAIN, RAW, 1, 1), options=(0, 3, 1, 6)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("node", NODES, ids=str)
def test_fused_equals_reference(
    node: Node, training: bool, device: torch.device, precise: torch.dtype
) -> None:
    built = Node(**{**vars(node), "dtype": precise}).build(device, training)
    reference, found = (built.outcome(backend) for backend in ("reference", "triton"))
    tolerance = 1e-9 if precise == torch.float64 else 1e-3
    for ours, wanted in zip(found, reference, strict=True):
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture
def precise() -> torch.dtype:
    """Kernels take float64 in the interpreter only."""
    return torch.float64 if CPU else torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_gradients_by_finite_differences(training: bool, device: torch.device) -> None:
    if not CPU:
        pytest.skip("float64 is for the interpreter")
    node = Node((2, RAW, PLAIN), (1, 2, 2, 3), c_out=2, options=(3, 0, 1, 4))
    built = node.build(device, training)
    with use_backend("triton"):
        assert torch.autograd.gradcheck(built.sum, built.leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [1.0, 30.0])
def test_half_precision_is_as_close_to_the_truth_as_maps_multiplied_out(
    dtype: torch.dtype, mean: float, device: torch.device
) -> None:
    node = Node((3, RAW, PLAIN), (2, 16, 6, 5), c_out=16, dtype=dtype, mean=mean)
    built = node.build(device)
    doubles = [leaf.detach().double().requires_grad_() for leaf in built.leaves]
    truth = Built(
        node,
        doubles[1 : 1 + len(built.maps)],
        doubles[1 + len(built.maps) :],
        doubles[0],
        [norm and copy.deepcopy(norm).double() for norm in built.norms],
    ).outcome("reference")
    reference, found = (built.outcome(backend) for backend in ("reference", "triton"))
    for ours, other, wanted in zip(found, reference, truth, strict=True):
        assert ours.dtype == other.dtype
        error, other_error = ((t.double() - wanted).norm() for t in (ours, other))
        assert error <= 2 * other_error + 0.01 * wanted.double().norm()


def test_weights_in_single_precision_under_autocast(device: torch.device) -> None:
    built = Node((2, RAW), dtype=torch.bfloat16).build(device)
    leaves = [built.z, *built.maps, *(w.detach().float().requires_grad_() for w in built.weights)]
    with use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        out = built.sum(*leaves)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    assert all(g.is_contiguous() for g in gradients[len(built.maps) + 1 :])


def test_what_is_kept(device: torch.device) -> None:
    """Depthwise, raw and plain maps, copies of the weights, and statistics."""
    node = Node((2, RAW, PLAIN), dtype=torch.float32)
    built, kept = node.build(device), list[Tensor]()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with use_backend("triton"), hooks:
        built.sum(built.z.detach(), *built.leaves[1:])
    c, c_out = node.shape[1], node.c_out
    statistics = 3 * c_out + 2 * (c + c * c + 3 * c_out)
    wanted = sum(leaf.numel() for leaf in built.leaves) + statistics
    assert sum(x.numel() for x in kept) == wanted


def test_without_gradients_and_where_only_some_are_wanted(device: torch.device) -> None:
    built = Node((2, RAW), dtype=torch.float32).build(device)
    with use_backend("triton"):
        wanted = built.sum(*built.leaves)
        with torch.no_grad():
            assert torch.equal(built.sum(*built.leaves), wanted)
        still = [leaf.detach() for leaf in built.leaves]
        for index, leaf in enumerate(built.leaves):
            own = [*still[:index], leaf, *still[index + 1 :]]
            (alone,) = torch.autograd.grad(built.sum(*own).square().sum(), leaf)
            (among,) = torch.autograd.grad(built.sum(*built.leaves).square().sum(), leaf)
            torch.testing.assert_close(alone, among)


def test_a_single_value_a_channel_has_no_variance(device: torch.device) -> None:
    built = Node((1,), (1, 3, 1, 1), dtype=torch.float32).build(device)
    for backend in ("reference", "triton"):
        with use_backend(backend), pytest.raises(ValueError, match="value.* (per|a) channel"):
            built.sum(*built.leaves)
    built.norms[0].eval()
    with use_backend("triton"):
        assert built.sum(*built.leaves).shape == (1, 4, 1, 1)


def test_same_inputs_same_bits(device: torch.device) -> None:
    built = Node((2, RAW, PLAIN), dtype=torch.float32).build(device)
    once, twice = built.outcome("triton"), built.outcome("triton")
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, w: Products(d[0], w), r"ys\[0\].maps: shape"),
        (lambda d, w: Products(d, w[:1]), r"ys\[0\].weights: 1 for 2 maps"),
        (lambda d, w: Products(d, [w[0], w[1][:2]]), r"ys\[0\].weights: shape"),
        (lambda d, w: Products(d[:, :, :1], w), r"ys\[0\].weights: shape"),
        (lambda d, w: Products(d[:, :1], w), "ys, map 2: shape"),
    ],
)
def test_bad_products_are_named(
    change: Callable[[Tensor, list[Tensor]], Products], message: str, backend: str
) -> None:
    built = Node((2, RAW)).build(torch.device("cpu"))
    entry = change(built.maps[0], built.weights)
    with use_backend(backend), pytest.raises(OperandError, match=message):
        mixed_norm_sum([entry, built.maps[1]], built.z, built.norms)


def test_products_of_another_dtype_and_plain_ones_are_refused(device: torch.device) -> None:
    built = Node((2, RAW), dtype=torch.float32).build(device)
    entry = Products(built.maps[0].bfloat16(), built.weights)
    with use_backend("triton"), pytest.raises(BackendError, match=r"ys\[1\] is torch.float32"):
        mixed_norm_sum([entry, built.maps[1]], built.z, built.norms)
    norms = [None, built.norms[1], built.norms[2]]
    entries = built.entries(built.maps, built.weights)
    with use_backend("triton"), pytest.raises(BackendError, match="None for a map of a stack"):
        mixed_norm_sum(entries, built.z, norms)


@dataclass(frozen=True)
class Leaving:
    """Edges that leave a map, of which all `to_sum` end in one node."""

    shape: tuple[int, int, int, int]
    c_out: int
    dilations: tuple[int, ...]
    to_sum: tuple[bool, ...]
    stacks: tuple[int, ...] | None = None
    stride: int = 1
    edges: int = 1

    def leaves(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        count, channels = self.edges * len(self.dilations), self.shape[1]
        x = random_map(*self.shape, dtype=dtype, device=device, mean=0.0)
        weights = [torch.randn(channels, 1, 3, 3) for _ in range(count)]
        weights += [torch.randn(self.c_out, channels, 1, 1) for _ in range(count)]
        return [leaf.to(device, dtype).requires_grad_() for leaf in (x, *weights)]

    def __call__(self, x: Tensor, *weights: Tensor) -> Tensor:
        """The sum of the node beside squares of the others."""
        half = len(weights) // 2
        settings = (self.dilations, self.stride, self.stacks, self.to_sum)
        found = separable_branches(x, weights[:half], weights[half:], *settings)
        counts = self.stacks or [len(self.dilations)] * self.edges
        first, entries, total = 0, [], torch.zeros((), dtype=x.dtype, device=x.device)
        for stack, count in zip(found, counts, strict=True):
            if self.to_sum[first % len(self.dilations)]:
                entries += stack
            else:
                total = total + sum(y.square().sum() for y in stack)
            first += count
        if entries:
            norms = [nn.BatchNorm2d(self.c_out, affine=False).to(x) for _ in range(half)]
            norms = norms[: sum(self.to_sum) * self.edges]
            z = torch.linspace(0.5, 1, len(norms), dtype=x.dtype, device=x.device)
            total = total + mixed_norm_sum(entries, z, norms).pow(3).mean()
        return total


LEAVING = [
    Leaving((2, 3, 5, 7), 3, (1, 2, 4, 8), (False, True, True, True), (1, 3, 1, 3), edges=2),
    Leaving((2, 2, 7, 4), 5, (1, 2, 4), (False, True, True), (1, 2, 1, 2), stride=2, edges=2),
    Leaving((2, 2, 4, 5), 3, (2, 3), (True, True), stride=2),
    Leaving((1, 4, 3, 5), 17, (3,), (True,), edges=2),
    Leaving((2, 2, 4, 3), 2, (2, 1, 1), (True, False, False), (1, 2, 1, 1, 1), edges=2),
    Leaving((2, 2, 4, 3), 3, (1, 2, 1), (False, True, False), (1, 1, 1)),
    Leaving((2, 3, 4, 3), 2, (1, 2), (False, True), (1, 1)),
]


@pytest.mark.usefixtures("left_to_nodes")
@pytest.mark.parametrize("case", LEAVING, ids=str)
def test_branches_that_end_in_a_node(
    case: Leaving, device: torch.device, precise: torch.dtype
) -> None:
    leaves = case.leaves(device, precise)
    outcomes = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            out = case(*leaves)
        outcomes.append([out, *torch.autograd.grad(out, leaves)])
    tolerance = 1e-8 if precise == torch.float64 else 1e-3
    for wanted, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("left_to_nodes")
@some_combinations("stride, edges", (1, 2), (1, 2))
def test_branches_by_finite_differences(stride: int, edges: int, device: torch.device) -> None:
    if not CPU:
        pytest.skip("float64 is for the interpreter")
    case = Leaving((1, 2, 4, 3), 2, (1, 2), (False, True), (1, 1) * edges, stride, edges)
    with use_backend("triton"):
        leaves = case.leaves(device, torch.float64)
        assert torch.autograd.gradcheck(case, leaves, fast_mode=True)


@pytest.mark.usefixtures("left_to_nodes")
def test_stacks_are_products_only_where_they_end_in_a_node(device: torch.device) -> None:
    case = LEAVING[0]
    x, *weights = case.leaves(device, torch.float32)
    arguments = (x, weights[:8], weights[8:], case.dilations, 1, case.stacks)
    with use_backend("triton"):
        found = separable_branches(*arguments, case.to_sum)
        assert [isinstance(stack, Products) for (stack,) in found] == [False, True] * 2
        assert found[1][0].maps.shape == (3, 2, 3, 5, 7)
        assert all(a is b for a, b in zip(found[3][0].weights, weights[13:], strict=True))
        assert not any(isinstance(stack, Products) for (stack,) in separable_branches(*arguments))


@pytest.mark.usefixtures("left_to_nodes")
def test_a_stack_that_nothing_reads(device: torch.device, precise: torch.dtype) -> None:
    case = LEAVING[0]
    leaves = case.leaves(device, precise)
    gradients = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            stack = separable_branches(
                leaves[0], leaves[1:9], leaves[9:], case.dilations, 1, case.stacks, case.to_sum
            )[1]
            norms = [nn.BatchNorm2d(3, affine=False).to(leaves[0]) for _ in range(3)]
            out = mixed_norm_sum(stack, leaves[0].new_ones(3), norms).pow(3).sum()
        gradients.append(torch.autograd.grad(out, leaves, materialize_grads=True))
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("left_to_nodes")
@pytest.mark.parametrize("training", [True, False])
def test_second_stages_that_end_in_a_node(
    training: bool, device: torch.device, precise: torch.dtype
) -> None:
    torch.manual_seed(0)
    ys = [random_map(2, 4, 5, 3, dtype=precise, device=device) for _ in range(2)]
    weights = [torch.randn(4, 1, 3, 3) for _ in ys] + [torch.randn(5, 4, 1, 1) for _ in ys]
    leaves = [leaf.to(device, precise).requires_grad_() for leaf in (*ys, *weights)]
    outcomes = []
    for backend in ("reference", "triton"):
        norms = [
            nn.BatchNorm2d(c, affine=False).to(leaves[0]).train(training) for c in (4, 4, 5, 5)
        ]
        with use_backend(backend):
            found = second_stages(
                [[y] for y in leaves[:2]], norms[:2], leaves[2:4], leaves[4:], to_sum=True
            )
            entries = [entry for (entry,) in found]
            assert [isinstance(one, Products) for one in entries] == 2 * [backend == "triton"]
            out = mixed_norm_sum(entries, leaves[0].new_ones(2), norms[2:])
        states = [value for norm in norms for value in norm.state_dict().values()]
        outcomes.append([out, *torch.autograd.grad(out.pow(3).sum(), leaves), *states])
    for wanted, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "out_channels", "stride", "wanted"),
    [
        ((16, 32, 64, 128), 32, 1, True),
        ((16, 64, 32, 64), 64, 1, True),
        ((2, 16, 64, 32, 64), 64, 1, True),
        ((16, 64, 31, 64), 64, 1, False),
        ((16, 64, 63, 127), 64, 2, True),
        ((16, 64, 62, 127), 64, 2, False),
        ((16, 128, 16, 32), 128, 1, False),
        ((16, 128, 32, 64), 128, 1, True),
        ((16, 144, 64, 128), 48, 1, False),
        ((16, 128, 64, 128), 129, 1, False),
    ],
)
def test_large_maps_of_as_wide_products_are_left_to_the_node(
    shape: tuple[int, ...], out_channels: int, stride: int, wanted: bool, device: torch.device
) -> None:
    x = torch.empty((), device=device, dtype=torch.bfloat16).expand(shape)
    assert products.pay(x, out_channels, stride) == wanted
    with suppose(torch.device("cuda")):
        assert products.pay(x, out_channels, stride) == wanted
        assert not products.pay(x.float(), out_channels, stride)
    assert products.WIDEST <= kernel.MAX_CHANNELS


@pytest.mark.parametrize(
    ("to_sum", "message"),
    [
        ((True,), "to_sum: 1 for 2 dilations"),
        ((True, False), "to_sum: .* divides a stack of 2 branches"),
    ],
)
def test_bad_flags_are_named(to_sum: tuple[bool, ...], message: str) -> None:
    x, *weights = LEAVING[2].leaves(torch.device("cpu"), torch.float32)
    with pytest.raises(OperandError, match=message):
        separable_branches(x, weights[:2], weights[2:], (2, 3), to_sum=to_sum)


def test_registration(device: torch.device) -> None:
    check = torch.library.opcheck
    built = Node((2, RAW, PLAIN, 1), (1, 2, 2, 3), c_out=3, dtype=torch.float32).build(device)
    d, y, x, beside = (one.detach() for one in built.maps)
    ds, z = [d, beside], torch.rand(3, device=device)
    matrices = stacked_matrices([weight.detach() for weight in built.weights], d)
    check(fused.product_statistics, (ds,))
    mean, covariance = fused.product_statistics(ds)
    check(fused.product_weights, (mean, covariance, matrices, z, 1e-5))
    statistics, weights, shift = fused.product_weights(mean, covariance, matrices, z, 1e-5)
    of_raw = statistics[:, :1].contiguous()
    check(fused.product_sum, (ds, weights, shift, [y], of_raw, [x], z[:2]))
    for training in (True, False):
        known = (matrices, mean, covariance, statistics, z, training)
        dz = torch.zeros(4, device=device)
        check(fused.product_gradients, (y, ds, *known, dz[:3]), test_utils=WITHOUT_COMPILER)
        of_others = (y, [y], [x], z[:2], of_raw, training, "triton", dz[2:])
        check(fused.mixed_sum_backward_beside, of_others, test_utils=WITHOUT_COMPILER)


WITHOUT_COMPILER = ("test_schema", "test_autograd_registration", "test_faketensor")
"""It has no form for operations that both write to an argument and return a list."""


def test_registration_of_branches(device: torch.device) -> None:
    check = torch.library.opcheck
    case = Leaving((1, 2, 3, 4), 3, (1, 2), (False, True), edges=2)
    x, *weights = (leaf.detach() for leaf in case.leaves(device, torch.float32))
    windows, matrices = stacked_windows(weights[:4]), stacked_matrices(weights[4:6], x)
    for stride in (1, 2):
        maps = branches.depthwise_maps(x, windows, [1, 2], stride, "triton")
        raw = torch.ones(2, *maps.shape[2:3], *maps.shape[4:], 3, device=device).movedim(-1, -3)
        gradients = [raw[:1], maps[0, 1:], raw[1:], maps[1, 1:]]
        settings = ([1, 2], stride, [0])
        check(
            branches.depthwise_branches_backward,
            (gradients, maps[:, :1].clone(), x, windows, matrices, *settings),
        )
