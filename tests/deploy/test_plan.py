"""Plans of fused launches compute what folded networks compute, and nothing that nobody reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.fused import FusedNetwork
from lgcnet_fast.deploy.lower import lower
from lgcnet_fast.deploy.packing import Packing
from lgcnet_fast.deploy.plan import Plan, Tile, dependencies
from lgcnet_fast.deploy.program import FoldedNetwork
from lgcnet_fast.errors import BackendError
from lgcnet_fast.nn.operations import FUSION_OPS
from lgcnet_fast.ops import upsample_argmax
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import make_space
from tests.deploy.networks import genotype_of, small_space, sparse_genotype, trained

SHORT = {"cells": 3, "reductions": [1, 2]}
"""As few cells as have three branches."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the largest logit."""


def planned(
    network: FoldedNetwork,
    size: tuple[int, int],
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Plan:
    return lower(network, size, batch, Packing(device or torch.device("cpu"), dtype))


def small_network(seed: int = 0, **options: object) -> FoldedNetwork:
    space = small_space(**(SHORT | options))
    genotype = space.random_genotype(torch.Generator().manual_seed(seed))
    return fold(trained(space, genotype, seed).float())


@torch.inference_mode()
def computed(
    network: FoldedNetwork,
    size: tuple[int, int],
    device: torch.device,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and labels of the plan, in an arena that was NaN, and those of the network."""
    generator = torch.Generator().manual_seed(sum(size))
    image = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)
    fused = FusedNetwork(planned(network, size, batch, dtype, device), device)
    # All bits set is NaN in every dtype.
    fused.arena.fill_(255)
    fused.image.copy_(image)
    fused.run()
    labels = torch.full((batch, *size), 255, dtype=torch.uint8, device=device)
    fused.write_labels(labels)
    expected = network(network_input(image, None))
    return fused.logits().float().cpu(), labels.cpu(), expected, upsample_argmax(expected, size)


def assert_equal(
    network: FoldedNetwork,
    size: tuple[int, int],
    device: torch.device,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:
    found, labels, expected, expected_labels = computed(network, size, device, batch, dtype)
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= TOLERANCE[dtype] * scale
    # NaN is larger than nothing, so unread memory would show above.
    if dtype == torch.float32:
        full = nn.functional.interpolate(expected, size, mode="bilinear", align_corners=True)
        best, second = full.topk(2, dim=1).values.unbind(1)
        clear = best - second > 1e-3
        assert torch.equal(labels[clear], expected_labels[clear])


@pytest.mark.usefixtures("large_tiles")
class TestEquality:
    @pytest.mark.parametrize("op", ["max3", "skip", "conv3", "sep3", "dil3_4"])
    def test_every_cell_operation(self, op: str, device: torch.device) -> None:
        space = small_space(**SHORT, head="none")
        assert_equal(fold(trained(space, genotype_of(space, cells=op)).float()), (17, 22), device)

    @pytest.mark.parametrize("op", ["conv1", "conv3", "gp5"])
    def test_fusion_operations(self, op: str, device: torch.device) -> None:
        space = small_space(**SHORT)
        genotype = genotype_of(space, cells="skip", fusion=op)
        assert_equal(fold(trained(space, genotype).float()), (17, 22), device)

    def test_the_other_fusion_graph(self, device: torch.device) -> None:
        assert_equal(small_network(1, fusion="grid13"), (17, 22), device)

    @pytest.mark.slow
    @pytest.mark.parametrize("graph", ["topdown13", "grid13"])
    @pytest.mark.parametrize("op", FUSION_OPS)
    def test_every_fusion_operation(self, op: str, graph: str, device: torch.device) -> None:
        space = small_space(**SHORT, fusion=graph)
        genotype = genotype_of(space, cells="skip", fusion=op)
        assert_equal(fold(trained(space, genotype).float()), (33, 50), device)

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
    def test_every_head_and_layout(self, options: dict, device: torch.device) -> None:
        assert_equal(small_network(2, **options), (21, 18), device)

    def test_the_gas_space(self, device: torch.device) -> None:
        space = small_space(name="gas")
        genotype = space.random_genotype(torch.Generator().manual_seed(1))
        assert_equal(fold(trained(space, genotype).float()), (17, 18), device)

    @pytest.mark.parametrize("seed", range(2))
    def test_networks_of_many_none_edges(self, seed: int, device: torch.device) -> None:
        space = small_space(cells=5, reductions=[2, 3], head="none")
        network = fold(trained(space, sparse_genotype(space, seed)).float())
        assert_equal(network, (17, 13), device)

    def test_an_empty_cell_leaves_a_map_of_biases(self, device: torch.device) -> None:
        space = small_space(head="none")
        values = genotype_of(space, cells="conv3").model_dump()
        cells = [*values["cells"][:2], ("none",) * 5, *values["cells"][3:]]
        genotype = space.Genotype.model_validate(values | {"cells": cells})
        network = fold(trained(space, genotype).float())
        [empty] = [x for x in planned(network, (17, 13)).launches if x.name == "cell3/preprocess1"]
        assert isinstance(empty, Tile) and not empty.terms
        assert_equal(network, (17, 13), device)

    @pytest.mark.parametrize("size", [(1, 1), (33, 49)])
    def test_sizes_and_batches(self, size: tuple[int, int], device: torch.device) -> None:
        assert_equal(small_network(3), size, device, batch=2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_16_bit_storage(self, dtype: torch.dtype, device: torch.device) -> None:
        assert_equal(small_network(4), (17, 33), device, dtype=dtype)

    def test_more_classes_than_the_fused_argmax_takes(self, device: torch.device) -> None:
        space = small_space(**SHORT, head="none")
        network = space.build(genotype_of(space, cells="skip"), 40).eval()
        assert_equal(fold(network), (9, 13), device)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_the_reference_network(self, dtype: torch.dtype, device: torch.device) -> None:
        space = make_space({"name": "lgcnet"})
        network = fold(trained(space, load_genotype("reference")).float())
        assert_equal(network, (33, 49), device, dtype=dtype)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(5, 15))
    def test_random_genotypes(self, seed: int, device: torch.device) -> None:
        assert_equal(small_network(seed, cells=5, reductions=[1, 3]), (33, 50), device)


# -- structure ------------------------------------------------------------------------------------


def reference_plan(dtype: torch.dtype = torch.float16) -> Plan:
    space = make_space({"name": "lgcnet"})
    return planned(fold(space.build(load_genotype("reference"), 19).eval()), (769, 1537), 1, dtype)


def test_the_reference_network_takes_few_launches() -> None:
    plan = reference_plan()
    assert len(plan.launches) <= 48
    # Preprocessing and classifier ride along with the nodes in front of them.
    names = {launch.name for launch in plan.launches}
    assert not any("preprocess1" in name for name in names) and "classifier" not in names


def test_launches_read_what_earlier_ones_wrote_and_every_buffer_is_read() -> None:
    for plan in (reference_plan(), reference_plan(torch.float32)):
        for index, needed in enumerate(dependencies(plan.launches)):
            assert all(other < index for other in needed)
        read = {buffer for launch in plan.launches for buffer in launch.reads}
        unread = [b.name for b in plan.buffers() if b not in read and not b.strips]
        assert unread == [plan.output.name]


def test_a_launch_never_reads_what_it_writes() -> None:
    for launch in reference_plan().launches:
        assert not set(launch.reads) & set(launch.writes), launch.name


def test_two_resizings_are_one_where_that_is_exact() -> None:
    network = fold_of_interpolations()
    exact = planned(network, (65, 129))
    inexact = planned(network, (60, 100))
    assert len(resizings(exact)) < len(resizings(inexact))


def fold_of_interpolations() -> FoldedNetwork:
    space = small_space()
    return fold(trained(space, genotype_of(space, cells="skip", up="interp")).float())


def resizings(plan: Plan) -> list[str]:
    return [launch.name for launch in plan.launches if launch.name.endswith("/resized")]


def test_weights_are_packed_once_for_all_sizes() -> None:
    network = small_network()
    packing = Packing(torch.device("cpu"), torch.float32)
    first, second = (lower(network, size, 1, packing) for size in ((33, 33), (65, 97)))
    tiles = [[x for x in plan.launches if isinstance(x, Tile)] for plan in (first, second)]
    shared = {
        id(term.weight) for tile in tiles[0] for term in tile.terms if term.weight is not None
    }
    assert shared & {id(term.weight) for tile in tiles[1] for term in tile.terms}


def test_maps_beyond_32_bit_addresses_are_refused() -> None:
    with pytest.raises(BackendError, match=r"2\^31.*smaller batches"):
        planned(small_network(), (4001, 8001), batch=64)
