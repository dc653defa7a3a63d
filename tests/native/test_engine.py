"""The deploy engine on the CUDA kernels, emulated, against the folded network in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.data.classes import CAMVID
from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy.blueprint import Blueprint
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.deploy.native_calls import NativeCalls, can_accumulate
from lgcnet_fast.deploy.native_engine import NativeEngine, NativeNetwork
from lgcnet_fast.deploy.operations import (
    Concatenation,
    Convolution,
    MaxPooling,
    Resizing,
    Sum,
)
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Plan, dependencies
from lgcnet_fast.deploy.plan_summary import launch_costs
from lgcnet_fast.deploy.program import IMAGE, FoldedNetwork, Step
from lgcnet_fast.deploy.step_costs import node_costs
from lgcnet_fast.deploy.step_plan import Node, plan_steps
from lgcnet_fast.errors import BackendError
from lgcnet_fast.nn.operations import FUSION_OPS
from lgcnet_fast.ops import upsample_argmax
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import make_space
from tests.deploy.networks import genotype_of, small_space, sparse_genotype, trained
from tests.deploy.test_arena import check
from tests.native.truth import poisoned_memory

SHORT = {"cells": 3, "reductions": [1, 2]}
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the largest logit."""
MARGIN = 1e-3
"""Between the two best logits, from which on labels have to agree."""


def small_network(seed: int = 0, **options: object) -> FoldedNetwork:
    space = small_space(**(SHORT | options))
    genotype = space.random_genotype(torch.Generator().manual_seed(seed))
    return fold(trained(space, genotype, seed).float())


def made(
    network: FoldedNetwork, size: tuple[int, int], batch: int, dtype: torch.dtype
) -> NativeNetwork:
    return NativeNetwork(plan_steps(network, size, batch, dtype), NativeCalls(CPU, dtype), CPU)


@torch.inference_mode()
def assert_equal(
    network: FoldedNetwork,
    size: tuple[int, int],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Logits, and labels where they are certain, from memory that was NaN."""
    generator = torch.Generator().manual_seed(sum(size))
    image = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)
    native = made(network, size, batch, dtype)
    # All bits set is NaN in every dtype.
    native.arena.fill_(255)
    native.image.copy_(image)
    with poisoned_memory():
        native.run()
    labels = torch.full((batch, *size), 255, dtype=torch.uint8)
    native.write_labels(labels)
    expected = network(network_input(image, None))
    found = native.logits().float()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())
    if dtype == torch.float32:
        assert_labels(labels, expected)


def assert_labels(labels: Tensor, logits: Tensor) -> None:
    size = (labels.shape[1], labels.shape[2])
    full = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)
    best, second = full.topk(2, dim=1).values.unbind(1)
    clear = best - second > MARGIN
    assert torch.equal(labels[clear], upsample_argmax(logits, size)[clear])


@pytest.mark.usefixtures("cuda_backend")
class TestEquality:
    @pytest.mark.parametrize("op", ["max3", "skip", "conv3", "sep3", "dil3_4", "dil3_8"])
    def test_every_cell_operation(self, op: str) -> None:
        space = small_space(**SHORT, head="none")
        assert_equal(fold(trained(space, genotype_of(space, cells=op)).float()), (17, 22))

    @pytest.mark.parametrize("graph", ["topdown13", "grid13"])
    @pytest.mark.parametrize("op", FUSION_OPS)
    def test_every_fusion_operation(self, op: str, graph: str) -> None:
        space = small_space(**SHORT, fusion=graph)
        genotype = genotype_of(space, cells="skip", fusion=op)
        assert_equal(fold(trained(space, genotype).float()), (17, 22))

    @pytest.mark.parametrize("up", ["deconv", "interp"])
    def test_ways_up(self, up: str) -> None:
        space = small_space(**SHORT)
        assert_equal(fold(trained(space, genotype_of(space, up=up)).float()), (18, 31))

    @pytest.mark.parametrize(
        "options",
        [
            {"head": "mscell"},
            {"head": "aspp"},
            {"head": "ppm"},
            {"head": "none"},
            {"stem_strides": [1, 2, 2]},
            {"widths": [5, 9, 17]},
        ],
        ids=str,
    )
    def test_every_head_and_layout(self, options: dict) -> None:
        assert_equal(small_network(2, **options), (21, 18))

    def test_the_gas_space(self) -> None:
        space = small_space(name="gas")
        genotype = space.random_genotype(torch.Generator().manual_seed(1))
        assert_equal(fold(trained(space, genotype).float()), (17, 18))

    @pytest.mark.parametrize("seed", range(3))
    def test_networks_of_many_none_edges(self, seed: int) -> None:
        space = small_space(cells=5, reductions=[2, 3], head="none")
        assert_equal(fold(trained(space, sparse_genotype(space, seed)).float()), (17, 13))

    def test_an_empty_cell_leaves_a_map_of_biases(self) -> None:
        space = small_space(head="none")
        values = genotype_of(space, cells="conv3").model_dump()
        cells = [*values["cells"][:2], ("none",) * 5, *values["cells"][3:]]
        genotype = space.Genotype.model_validate(values | {"cells": cells})
        assert_equal(fold(trained(space, genotype).float()), (17, 13))

    @pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 49)])
    def test_sizes_and_batches(self, size: tuple[int, int]) -> None:
        assert_equal(small_network(3), size, batch=2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_16_bit_storage(self, dtype: torch.dtype) -> None:
        assert_equal(small_network(4), (17, 33), dtype=dtype)

    def test_more_classes_than_the_fused_argmax_takes(self) -> None:
        space = small_space(**SHORT, head="none")
        network = space.build(genotype_of(space, cells="skip"), 40).eval()
        assert_equal(fold(network), (9, 13))

    @pytest.mark.parametrize("seed", range(5, 9))
    def test_random_genotypes(self, seed: int) -> None:
        assert_equal(small_network(seed, cells=5, reductions=[1, 3]), (33, 50))

    def test_the_reference_network(self) -> None:
        assert_equal(reference_network(), (33, 49))

    def test_maps_that_several_read(self) -> None:
        """In two concatenations, twice in one, in a sum and elsewhere, joined maps joined again."""
        steps = [
            Step("a", convolution(3, 4), (IMAGE,), 1),
            Step("b", convolution(4, 3, side=1), ("a",), 1),
            Step("c", convolution(4, 4, side=1), ("a",), 1),
            Step("a+c", Sum(), ("c", "a"), 1),
            Step("twice", Concatenation(), ("a", "b", "a"), 1),
            Step("all", Concatenation(), ("b", "twice", "a+c"), 1),
            Step("pooled", MaxPooling(2), ("all",), 2),
            Step("up", Resizing(), ("pooled",), 1),
            Step("both", Sum(), ("up", "all"), 1),
            Step("doubled", Sum(), ("both", "both"), 1),
            Step("end", Concatenation(), ("doubled", "c"), 1),
        ]
        assert_equal(FoldedNetwork(steps).eval(), (5, 6), batch=2)


def convolution(channels: int, outputs: int, side: int = 3) -> Convolution:
    generator = torch.Generator().manual_seed(channels + outputs)
    weight = torch.randn(outputs, channels, side, side, generator=generator) / 3
    return Convolution(weight, torch.randn(outputs, generator=generator), relu_before=side == 1)


def reference_network() -> FoldedNetwork:
    space = make_space({"name": "lgcnet"})
    return fold(trained(space, load_genotype("reference")).float())


@pytest.mark.usefixtures("cuda_backend")
class TestEngine:
    @pytest.mark.parametrize("size", [(17, 30), (40, 21)])
    def test_at_the_size_of_the_network_and_resized(self, size: tuple[int, int]) -> None:
        network = small_network(1)
        blueprint = Blueprint(load_genotype("reference"), CAMVID, (17, 30), network)
        engine = Engine(blueprint, CPU, backend="cuda")
        assert isinstance(engine.runner, NativeEngine)
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
        first = engine.labels(image)
        with torch.inference_mode():
            assert_labels(first[None], network(network_input(image[None], (17, 30))))
        before = first.clone()
        second = engine.labels(255 - image)
        assert torch.equal(first, before) and not torch.equal(first, second)

    def test_images_that_the_kernels_cannot_take_are_refused(self) -> None:
        blueprint = Blueprint(load_genotype("reference"), CAMVID, None, small_network())
        with pytest.raises(BackendError, match="1x32769.*'cuda'.*reference"):
            Engine(blueprint, CPU, backend="cuda").labels(torch.zeros(1, 32769, 3).byte())


# -- structure ------------------------------------------------------------------------------------


def reference_plan() -> Plan[Node]:
    space = make_space({"name": "lgcnet"})
    network = fold(space.build(load_genotype("reference"), 19).eval())
    return plan_steps(network, (769, 1537), 1, torch.float32)


def test_concatenations_of_the_reference_network_copy_nothing() -> None:
    def is_copy(node: Node) -> bool:
        first, *others = node.addends
        if others or first.source is None:
            return False
        return isinstance(first.operation, Resizing) and first.source.size == node.out.size

    nodes = reference_plan().launches
    assert not [node.name for node in nodes if is_copy(node)]
    assert any(node.out.whole is not None for node in nodes)


def test_kernels_that_cannot_add_come_first() -> None:
    for node in reference_plan().launches:
        able = [can_accumulate(addend.operation) for addend in node.addends]
        assert able == sorted(able)


@pytest.mark.parametrize("streams", [1, 4])
def test_maps_in_use_share_no_memory(streams: int) -> None:
    check(reference_plan(), streams)


def test_nodes_wait_for_every_part_of_a_concatenation() -> None:
    plan = reference_plan()
    for index, (node, needed) in enumerate(
        zip(plan.launches, dependencies(plan.launches), strict=True)
    ):
        assert all(other < index for other in needed)
        for addend in node.addends:
            channels = sum(buffer.channels for buffer in addend.reads)
            assert addend.source is None or channels == addend.source.channels


def test_costs_of_the_reference_network() -> None:
    """Operations are those of the fused plan, whose launches compute the same."""
    plan = reference_plan()
    space = make_space({"name": "lgcnet"})
    network = fold(space.build(load_genotype("reference"), 19).eval())
    fused = launch_costs(lower(network, plan.size, 1, Packing(CPU, torch.float32)))
    found, expected = (
        sum(cost.operations for cost in costs) for costs in (node_costs(plan), fused)
    )
    assert 0.98 < found / expected < 1.02
    for cost, node in zip(node_costs(plan), plan.launches, strict=True):
        assert cost.bytes_written == plan.bytes_of(node.out) * len(node.addends)
