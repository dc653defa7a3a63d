"""Cells under the Triton backend against the reference: outputs, gradients, running statistics."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lgcnet_fast.nn.candidates
import lgcnet_fast.nn.mixed
from lgcnet_fast.nn import fusion
from lgcnet_fast.nn.cell import SearchCell
from lgcnet_fast.nn.fusion import FUSION_WIDTH, derived_fusion_cell, search_fusion_cell
from lgcnet_fast.nn.fusion_graphs import FUSION_GRAPHS
from lgcnet_fast.nn.mixed import MixedOp
from lgcnet_fast.nn.primitives import (
    Deconvolution,
    DepthwiseSeparable,
    FactorizedReduce,
    Interpolate,
    ReLUConvBN,
    Source,
)
from lgcnet_fast.ops import (
    Products,
    Recomputable,
    fused_depthwise_branches,
    fused_second_stages,
    gathered_running_statistics,
    mixed_norm_sum,
    use_backend,
)
from lgcnet_fast.ops.backend import current_backend
from lgcnet_fast.ops.recompute import Remembered
from tests.combinations import some_cases, some_combinations

pytestmark = pytest.mark.usefixtures("without_tf32")
CELL_MAP = (3, 6)
"""Every row takes the interpreter long; dilations 1, 2 and 4 reach columns, 1 and 2 also rows."""


def random_map(*shape: int, device: torch.device) -> Tensor:
    images, channels, height, width = shape
    values = torch.randn(images, height, width, channels, device=device)
    return values.movedim(-1, 1).requires_grad_()


def outcome(
    module: nn.Module, call: Callable[[nn.Module], Tensor], inputs: Sequence[Tensor], backend: str
) -> dict[str, Tensor]:
    """Output, gradients and state after one step of a copy of `module`."""
    module = copy.deepcopy(module)
    with use_backend(backend):
        out = call(module)
    torch.manual_seed(2)
    g = torch.randn(out.shape).to(out)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(out, [*inputs, *parameters.values()], g)
    names = [*(f"input {i}" for i in range(len(inputs))), *parameters]
    found = {f"gradient of {name}": value for name, value in zip(names, gradients, strict=True)}
    return found | {"output": out} | module.state_dict()


def assert_same(
    module: nn.Module, call: Callable[[nn.Module], Tensor], inputs: Sequence[Tensor]
) -> None:
    reference, fused = (outcome(module, call, inputs, name) for name in ("reference", "triton"))
    for name, wanted in reference.items():
        found = fused[name]
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
        scale = wanted.double().square().mean().sqrt()
        assert (found - wanted).abs().max() <= 1e-3 * scale + 1e-5, name


@pytest.fixture(params=[True, False], ids=["products", "multiplied out"])
def pay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products are left to the nodes: the interpreter takes any dtype either way."""
    for module in (fused_depthwise_branches, fused_second_stages):
        monkeypatch.setattr(module, "pay", lambda *arguments: request.param)
    return bool(request.param)


@some_combinations(
    "kind, pay",
    [(False, True), (False, False), (True, False), (True, True)],
    (True, False),
    indirect=["pay"],
)
def test_search_cell(kind: tuple[bool, bool], pay: bool, device: torch.device) -> None:
    reduction, training = kind
    torch.manual_seed(0)
    cell = SearchCell(3, 4, 4, reduction, reduce_first=False)
    cell = cell.to(device, memory_format=torch.channels_last).train(training)
    s0, s1 = (random_map(1, channels, *CELL_MAP, device=device) for channels in (3, 4))
    z = torch.rand(5, 8, device=device).softmax(1).requires_grad_()
    assert_same(cell, lambda cell: cell(s0, s1, z), [s0, s1, z])


def test_search_cell_whose_dense_convolutions_read_the_map_itself(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes any dtype and any channels."""
    monkeypatch.setattr("lgcnet_fast.kernels.conv3.serves", lambda x, out_channels: True)
    torch.manual_seed(0)
    cell = SearchCell(3, 4, 4, reduction=False, reduce_first=False)
    cell = cell.to(device, memory_format=torch.channels_last)
    s0, s1 = (random_map(1, channels, *CELL_MAP, device=device) for channels in (3, 4))
    z = torch.rand(5, 8, device=device).softmax(1).requires_grad_()
    assert_same(cell, lambda cell: cell(s0, s1, z), [s0, s1, z])


@pytest.fixture
def sparing(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Branches come again, as they do by the backend `cuda` in half precision: their maps."""
    made: list[torch.Size] = []

    class Watched(Remembered):
        def __call__(self) -> Tensor:
            value = super().__call__()
            made.append(value.shape)
            return value

    def spares(x: Tensor) -> bool:
        return current_backend().name == "triton"

    monkeypatch.setattr(lgcnet_fast.nn.candidates, "spares", spares)
    monkeypatch.setattr(lgcnet_fast.nn.candidates, "Remembered", Watched)
    for module in (fused_depthwise_branches, fused_second_stages):
        monkeypatch.setattr(module, "pay", lambda *arguments: False)
    return made


@pytest.mark.parametrize("reduction", [False, True])
def test_search_cell_that_spares_memory(
    reduction: bool, sparing: list[torch.Size], device: torch.device
) -> None:
    torch.manual_seed(0)
    cell = SearchCell(3, 4, 4, reduction, reduce_first=False)
    cell = cell.to(device, memory_format=torch.channels_last)
    s0, s1 = (random_map(1, channels, *CELL_MAP, device=device) for channels in (3, 4))
    z = torch.rand(5, 8, device=device).softmax(1).requires_grad_()
    assert_same(cell, lambda cell: cell(s0, s1, z), [s0, s1, z])
    assert len(sparing) == 5 and {shape[0] for shape in sparing} == {3}  # Of every edge, no pair.


def test_what_is_made_again_under_autocast_is_what_was_made(
    sparing: list[torch.Size], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass has no autocast of its own."""
    torch.manual_seed(0)
    block = DepthwiseSeparable(4, 4, stride=1, dilation=2, affine=False)
    edge = MixedOp({"dil3_2": block}).to(device, memory_format=torch.channels_last)
    x = random_map(2, 4, *CELL_MAP, device=device).detach().bfloat16().requires_grad_()
    z = torch.ones(1, device=device, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        with use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
            out = edge(z, x)
        return torch.autograd.grad(out.float().square().sum(), [x, z, *edge.parameters()])

    found = gradients()
    assert len(sparing) == 1
    monkeypatch.setattr(lgcnet_fast.nn.candidates, "spares", lambda x: False)
    for one, wanted in zip(found, gradients(), strict=True):
        assert torch.equal(one, wanted)
    assert len(sparing) == 1


def test_dense_convolutions_of_a_map(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of stride 1 of 16 bits and whole blocks make no ReLU, the others one together."""
    torch.manual_seed(0)
    shapes = [(32, 3, 1), (32, 3, 1), (32, 1, 1), (32, 3, 2), (64, 3, 1), (24, 3, 1)]
    blocks = [ReLUConvBN(32, out, kernel, stride) for out, kernel, stride in shapes]
    layers = [block.layer.to(device, torch.bfloat16) for block in blocks]
    x = random_map(1, 32, 3, 4, device=device).detach().bfloat16().requires_grad_()
    weights = [layer.weight for layer in layers]
    relus: list[int] = []

    def counted(x: Tensor, relu: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        relus.append(1)
        return relu(x)

    monkeypatch.setattr(F, "relu", counted)

    def outcome(backend: str, chosen: slice) -> list[Tensor]:
        relus.clear()
        with use_backend(backend):
            maps = Source(x).convolved(layers[chosen])
        total = sum(y.float().square().sum() for y in maps)
        return [*maps, *torch.autograd.grad(total, [x, *weights[chosen]])]

    for chosen, made in ((slice(2), 0), (slice(6), 2)):
        found, wanted = outcome("triton", chosen), outcome("reference", chosen)
        assert len(relus) == 1
        outcome("triton", chosen)
        assert len(relus) == made
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            scale = theirs.double().square().mean().sqrt()
            assert (ours - theirs).abs().max() <= 0.05 * scale


@some_cases("pay", (True, False), 0, indirect=["pay"])
def test_fusion_cell(pay: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if pay and device.type == "cuda":
        pytest.skip("products take float64 in the interpreter only")
    torch.manual_seed(0)
    # One block of channels instead of three: the kernels' own tests have several.
    monkeypatch.setattr(fusion, "FUSION_WIDTH", 5)
    graph = FUSION_GRAPHS["mscell"]
    cell = search_fusion_cell(graph, (4, 6)).to(device, memory_format=torch.channels_last)
    # In double precision: two images leave gp1's batch norm two values, which amplifies rounding.
    cell.double()
    maps = random_map(2, 4, 3, 5, device=device), random_map(2, 6, 2, 3, device=device)
    features = [x.detach().double().requires_grad_() for x in maps]
    edges = {edge.name: 10 for edge in graph.op_edges} | {edge.name: 2 for edge in graph.up_edges}
    z = {
        edge: torch.rand(options, dtype=torch.float64, device=device).requires_grad_()
        for edge, options in edges.items()
    }
    assert_same(cell, lambda cell: cell(features, z), [*features, *z.values()])


def test_depthwise_separable_candidates_reach_the_node_as_products(
    pay: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def watched(ys: Sequence[Tensor | Products], *arguments: Any) -> Tensor:
        seen.append([len(y.weights) for y in ys if isinstance(y, Products)])
        return mixed_norm_sum(ys, *arguments)

    monkeypatch.setattr(lgcnet_fast.nn.mixed, "mixed_norm_sum", watched)
    cell = SearchCell(3, 4, 4, reduction=False, reduce_first=False).to(device)
    z = torch.rand(5, 8, device=device)
    with use_backend("triton"):
        cell(random_map(2, 3, 5, 6, device=device), random_map(2, 4, 5, 6, device=device), z)
    # sep3 and three dilations of each edge.
    assert seen == ([[1, 3] * 2, [1, 3] * 3] if pay else [[], []])


@pytest.mark.parametrize("name", ["grid13", "mscell"])
def test_pointwise_edges_of_a_derived_fusion_cell(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    graph, channels, size = FUSION_GRAPHS[name], (4, 6, 5), (5, 4)
    operations = {edge.name: "conv1" for edge in graph.op_edges}
    operations |= {edge.name: "interp" for edge in graph.up_edges}
    cell = derived_fusion_cell(graph, channels[: len(graph.inputs)], operations)
    cell = cell.to(device, torch.float64, memory_format=torch.channels_last)
    features = []
    for count in channels[: len(graph.inputs)]:
        x = random_map(2, count, *size, device=device)
        features.append(x.detach().double().requires_grad_())
        size = tuple(-(-side // 2) for side in size)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with use_backend("triton"), hooks:
        cell(features)
    assert all(x.ndim != 4 or x.shape[1] < 2 * FUSION_WIDTH or x.shape[2:] == (1, 1) for x in kept)
    assert_same(cell, lambda cell: cell(features), features)


@pytest.mark.parametrize("stride, dilation", [(1, 2), (2, 1)])
def test_separable_convolution_of_a_derived_network(
    stride: int, dilation: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    module = DepthwiseSeparable(3, 5, stride, dilation).to(device)
    x = random_map(2, 3, 5, 6, device=device)
    assert_same(module, lambda module: module(x), [x])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", [ReLUConvBN, FactorizedReduce])
def test_blocks_without_affine_part(
    block: type[nn.Module], training: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    module = block(3, 4, affine=False).to(device, torch.float64).train(training)
    x = random_map(2, 3, 5, 6, device=device).detach().double().requires_grad_()
    reference, fused = (
        outcome(module, lambda module: module(x), [x], name) for name in ("reference", "triton")
    )
    assert list(fused) == list(reference)
    torch.testing.assert_close(fused, reference)


def test_norms_of_blocks_are_gathered(device: torch.device) -> None:
    module = ReLUConvBN(3, 4, affine=False).to(device)
    with use_backend("triton"), gathered_running_statistics():
        module(random_map(2, 3, 5, 6, device=device))
        assert module.norm.num_batches_tracked == 0
    assert module.norm.num_batches_tracked == 1


@pytest.mark.parametrize("backend, count, kept", [("reference", 4, True), ("triton", 1, False)])
def test_cheap_maps_are_not_kept(
    backend: str, count: int, kept: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpolated maps are computed again in the backward pass; Triton keeps pooled ones."""
    seen: list[weakref.ref[torch.UntypedStorage]] = []

    def watched(source: Source, raw: Recomputable, cheap: Any = Source.cheap) -> Tensor:
        y = cheap(source, raw)
        seen.append(weakref.ref(y.untyped_storage()))
        return y

    monkeypatch.setattr(Source, "cheap", watched)
    cell = SearchCell(3, 4, 4, reduction=False, reduce_first=False).to(device)
    edge = MixedOp({"deconv": Deconvolution(3, affine=False), "interp": Interpolate()}).to(device)
    s0, s1 = random_map(2, 3, 2, 3, device=device), random_map(2, 4, 2, 3, device=device)
    with use_backend(backend):
        outputs = [
            cell(s0, s1, torch.rand(5, 8, device=device, requires_grad=True)),
            edge(torch.rand(2, device=device, requires_grad=True), s0, (3, 5)),
        ]
    gc.collect()
    assert len(seen) == count and all((storage() is not None) is kept for storage in seen)
    sum(y.square().sum() for y in outputs).backward()


def test_autocast_cell_computes_in_half_precision(device: torch.device) -> None:
    torch.manual_seed(0)
    cell = SearchCell(3, 4, 4, reduction=False, reduce_first=False)
    cell = cell.to(device, memory_format=torch.channels_last)
    s0, s1 = (random_map(1, channels, *CELL_MAP, device=device) for channels in (3, 4))
    z = torch.rand(5, 8, device=device).softmax(1)
    outputs = []
    for backend in ("reference", "triton"):
        with use_backend(backend), torch.autocast(device.type, torch.bfloat16):
            outputs.append(copy.deepcopy(cell)(s0, s1, z))
    reference, fused = outputs
    assert fused.dtype == reference.dtype == torch.bfloat16
    assert (fused.double() - reference.double()).norm() < 0.03 * reference.double().norm()
