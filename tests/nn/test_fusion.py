import pytest
import torch

from lgcnet_fast.nn.fusion import FUSION_WIDTH, derived_fusion_cell, search_fusion_cell
from lgcnet_fast.nn.fusion_graphs import FUSION_GRAPHS
from lgcnet_fast.nn.heads import ASPP, PPM, Classifier
from lgcnet_fast.nn.operations import FUSION_OPS, UP_OPS
from lgcnet_fast.ops import concat_upsample

CHANNELS = (8, 16, 32)
SIZES = [(9, 17), (23, 30), (12, 15)]


def _features(graph, size):
    maps = []
    for channels in CHANNELS[: len(graph.inputs)]:
        maps.append(torch.randn(2, channels, *size))
        size = tuple(-(-n // 2) for n in size)
    return maps


def _z(graph):
    rows = {edge.name: torch.rand(10) for edge in graph.op_edges}
    return rows | {edge.name: torch.rand(2) for edge in graph.up_edges}


@pytest.mark.parametrize(
    "name, ops, ups", [("topdown13", 6, 7), ("grid13", 9, 4), ("mscell", 4, 2)]
)
def test_edges_are_numbered_through(name, ops, ups):
    graph = FUSION_GRAPHS[name]
    assert (len(graph.op_edges), len(graph.up_edges)) == (ops, ups)
    names = [edge.name for edge in (*graph.op_edges, *graph.up_edges)]
    assert sorted(names, key=lambda n: int(n[1:])) == [f"E{i}" for i in range(1, ops + ups + 1)]


def test_topdown13_has_nine_nodes():
    graph = FUSION_GRAPHS["topdown13"]
    assert len(graph.inputs) + len(graph.op_edges) == 9


@pytest.mark.parametrize("name", FUSION_GRAPHS)
def test_graphs_are_well_formed(name):
    """Sources come first, edges stay on their level, up-sampling ends one level finer."""
    graph = FUSION_GRAPHS[name]
    known = set(graph.inputs)
    for edge in graph.edges:
        assert known.issuperset(edge.sources)
        below = 1 if edge.kind == "up" else 0
        assert all(graph.level(source) == edge.level + below for source in edge.sources)
        known.add(edge.name)
    used = {source for edge in graph.edges for source in edge.sources} | set(graph.output)
    assert used == known


def test_topdown13_input_channels():
    cell = derived_fusion_cell(
        FUSION_GRAPHS["topdown13"],
        CHANNELS,
        {f"E{i}": "conv1" if i in (1, 2, 3, 8, 9, 10) else "interp" for i in range(1, 14)},
    )
    assert [cell.edges[f"E{i}"][1].in_channels for i in (1, 2, 3, 8, 9, 10)] == [
        48, 48, 48, 144, 96, 48
    ]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUSION_GRAPHS)
def test_search_and_every_derived_choice_run(name, size):
    graph = FUSION_GRAPHS[name]
    channels, features = CHANNELS[: len(graph.inputs)], _features(graph, size)
    assert search_fusion_cell(graph, channels)(features, _z(graph)).shape == (2, 48, *size)
    for choice in range(10):
        ops = {edge.name: FUSION_OPS[choice] for edge in graph.op_edges}
        ops |= {edge.name: UP_OPS[choice % 2] for edge in graph.up_edges}
        cell = derived_fusion_cell(graph, channels, ops)
        assert cell(features).shape == (2, FUSION_WIDTH, *size)


@pytest.mark.parametrize("name", FUSION_GRAPHS)
def test_gradients_reach_every_weight_and_every_option(name):
    graph = FUSION_GRAPHS[name]
    cell = search_fusion_cell(graph, CHANNELS[: len(graph.inputs)])
    z = {edge: row.requires_grad_() for edge, row in _z(graph).items()}
    cell(_features(graph, (9, 17)), z).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cell.parameters())
    assert all((row.grad != 0).all() for row in z.values())


@pytest.mark.parametrize("size", [(9, 12), (1, 1)])
@pytest.mark.parametrize("head, channels", [(ASPP, 128), (PPM, 128)])
def test_fixed_heads(head, channels, size):
    assert head(16)(torch.randn(2, 16, *size)).shape == (2, channels, *size)


def test_classifier():
    classifier = Classifier(48, 19)
    assert sum(p.numel() for p in classifier.parameters()) == 931
    assert classifier(torch.randn(1, 48, 5, 4)).shape == (1, 19, 5, 4)


@pytest.mark.parametrize("name", FUSION_GRAPHS)
def test_pointwise_edges_are_those_of_the_concatenation(name):
    """Bit for bit in the reference: the modules as they are, of the concatenated map."""
    torch.manual_seed(0)
    graph = FUSION_GRAPHS[name]
    operations = {edge.name: "conv1" for edge in graph.op_edges}
    operations |= {edge.name: "interp" for edge in graph.up_edges}
    cell = derived_fusion_cell(graph, CHANNELS[: len(graph.inputs)], operations)
    features = _features(graph, (9, 12))
    found = cell(features)
    for module in cell.edges.values():
        module.of_concatenation = lambda maps, size, module=module: module(
            concat_upsample(maps, size)
        )
    assert torch.equal(cell(features), found)
