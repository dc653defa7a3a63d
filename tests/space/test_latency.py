import pytest
import torch

from lgcnet_fast.errors import TableError
from lgcnet_fast.latency.genotypes import light_genotype
from lgcnet_fast.space.base import LutKey
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.lgcnet_keys import at_stride
from lgcnet_fast.space.registry import make_space

SMALL = {"cells": 5, "reductions": [1, 3], "widths": [4, 8, 16]}
HEADS = [
    {"head": "dcfc"},
    {"head": "dcfc", "fusion": "grid13"},
    {"head": "mscell"},
    {"head": "aspp"},
    {"head": "ppm"},
    {"head": "none"},
]
SIZE = (97, 193)


def _table(keys):
    return {key: 0.01 * (1 + 7 * i % 101) for i, key in enumerate(keys)}


def _table_sum(space, genotype, table, size, num_classes):
    """Latency of a genotype, edge by edge from its own layout: what the derived network runs."""
    total = 0.0
    for cell, ops in zip(genotype.layout.cells, genotype.cells, strict=True):
        for edge, op in enumerate(ops):
            from_input = edge < 4
            stride = 2 if cell.reduction and from_input else 1
            height, width = at_stride(size, cell.stride_in1 if from_input else cell.stride)
            if op != "none":
                key = LutKey(f"cell.{op}", cell.channels, cell.channels, height, width, stride)
                total += table[key]
    for name, op in genotype.fusion.ops.items() if genotype.fusion else ():
        edge = next(edge for edge in genotype.fusion.graph.edges if edge.name == name)
        source = edge.level + (edge.kind == "up")
        at = at_stride(size, genotype.layout.cells[genotype.taps[source]].stride)
        family, stride = ("up", 2) if edge.kind == "up" else ("fusion", 1)
        total += table[LutKey(f"{family}.{op}", 48 * len(edge.sources), 48, *at, stride)]
    return total


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_one_hot_latency_is_the_table_sum_of_the_derived_network(options):
    space = make_space(SMALL | options)
    table = _table(space.lut_keys(SIZE, 7))
    model = space.latency_model(table, SIZE, 7)
    for seed in range(5):
        genotype = space.random_genotype(torch.Generator().manual_seed(seed))
        terms = model(space.one_hot(genotype))
        expected = _table_sum(space, genotype, table, SIZE, 7)
        assert terms.searchable.item() == pytest.approx(expected, rel=1e-5)
        assert terms.total.item() == pytest.approx(expected + terms.constant, rel=1e-5)
        torch.testing.assert_close(terms.edges.sum(), terms.cells.sum())
        assert len(terms.cells) == 5 + (space.options.graph is not None)


def test_paper_network_terms():
    space = make_space({"name": "lgcnet"})
    table = dict.fromkeys(space.lut_keys((769, 1537), 19), 1.0)
    terms = space.latency_model(table, (769, 1537), 19)(space.one_hot(load_genotype("reference")))
    none = sum(op == "none" for cell in load_genotype("reference").cells for op in cell)
    assert terms.searchable == 70 - none + 13
    assert len(terms.edges) == 83 and len(terms.cells) == 15
    assert terms.cells[-1] == 13
    # Stem, 3 constants a cell, 3 reductions, 2 concatenations, 2 sums, classifier.
    assert terms.constant == 1 + 14 * 3 + 3 + 2 + 2 + 1


def test_none_is_free_and_its_z_costs_nothing():
    space = make_space(SMALL | {"head": "none"})
    model = space.latency_model(_table(space.lut_keys(SIZE, 7)), SIZE, 7)
    none = space.arch_groups()[0].options.index("none")
    z = torch.zeros(25, 8)
    z[:, none] = 1
    assert model({"cells": z}).searchable == 0


def test_gradient_is_the_table():
    space = make_space(SMALL)
    model = space.latency_model(_table(space.lut_keys(SIZE, 7)), SIZE, 7)
    z = {
        g.name: torch.rand(len(g.rows), len(g.options), requires_grad=True)
        for g in space.arch_groups()
    }
    model(z).searchable.backward()
    assert torch.equal(z["cells"].grad, model.cells)
    assert torch.equal(z["up"].grad, model.up)


@pytest.mark.parametrize("size", [(97, 193), (64, 96)])
@pytest.mark.parametrize("options", [*HEADS, {"stem_strides": [2, 1, 2]}], ids=str)
def test_every_key_has_a_module_that_runs(options, size):
    space = make_space(SMALL | options)
    keys = space.lut_keys(size, 7)
    assert len(set(keys)) == len(keys)
    for key in keys:
        entry = space.lut_module(key)
        inputs = [torch.randn(shape) for shape in entry.input_shapes]
        assert inputs[0].shape == (1, key.c_in, key.h_in, key.w_in)
        with torch.no_grad():
            out = entry.module.eval()(*inputs)
        map_out = out[-1] if key.op == "const.stem" else out
        assert map_out.shape[:2] == (1, key.c_out), key


def test_cell_entries_include_the_accumulating_sum():
    space = make_space(SMALL)
    key = next(key for key in space.lut_keys(SIZE, 7) if key.op == "cell.skip" and key.stride == 1)
    entry = space.lut_module(key)
    x, accumulator = (torch.randn(shape) for shape in entry.input_shapes)
    assert torch.equal(entry.module(x, accumulator), x + accumulator)


def test_pool_entries_have_no_batch_norm():
    space = make_space(SMALL)
    for key in space.lut_keys(SIZE, 7):
        if key.op == "cell.max3":
            assert not list(space.lut_module(key).module.parameters())


def test_a_missing_entry_is_named():
    space = make_space(SMALL)
    table = _table(space.lut_keys(SIZE, 7))
    key = next(iter(table))
    del table[key]
    with pytest.raises(TableError, match=f"lacks the entry '{key}'"):
        space.latency_model(table, SIZE, 7)
    with pytest.raises(TableError, match="lacks the entry"):
        space.latency_model(_table(space.lut_keys((65, 65), 7)), SIZE, 7)


@pytest.mark.parametrize(
    "op", ["cell.none", "cell.conv5", "fusion.skip", "const.magic", "conv3", ""]
)
def test_foreign_keys_are_refused(op):
    with pytest.raises(TableError, match="does not belong"):
        make_space(SMALL).lut_module(LutKey(op, 4, 4, 9, 9, 1))


def test_the_model_moves_with_its_device_and_keeps_nothing_in_checkpoints():
    space = make_space(SMALL)
    model = space.latency_model(_table(space.lut_keys(SIZE, 7)), SIZE, 7)
    assert dict(model.named_buffers()).keys() >= {"cells", "fusion", "up"}
    assert not model.state_dict()


# -- tables of whole engines ----------------------------------------------------------------------


def _engine_sum(space, genotype, table, size, num_classes):
    """Edge by edge, and each node and input that is used once."""
    total = _table_sum(space, genotype, table, size, num_classes)
    for cell, ops in zip(genotype.layout.cells, genotype.cells, strict=True):
        i1x1, i2x1, i1x2, i2x2, x1x2 = (op != "none" for op in ops)
        at = at_stride(size, cell.stride)
        node = table[LutKey("node.cell", cell.channels, cell.channels, *at, 1)]
        x1 = i1x1 or i2x1
        if x1x2 and not x1:
            total -= table[LutKey(f"cell.{ops[4]}", cell.channels, cell.channels, *at, 1)]
        total += node * (x1 + (i1x2 or i2x2 or (x1x2 and x1)))
        if i1x1 or i1x2:
            first = "factorized_reduce" if cell.reduce_first else "relu_conv_bn"
            at0, stride = at_stride(size, cell.stride_in0), 2 if cell.reduce_first else 1
            total += table[LutKey(f"input.{first}", cell.c_in0, cell.channels, *at0, stride)]
        if i2x1 or i2x2:
            at1 = at_stride(size, cell.stride_in1)
            total += table[LutKey("input.relu_conv_bn", cell.c_in1, cell.channels, *at1, 1)]
    return total


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_engines_pay_once_for_what_edges_share(options):
    space = make_space(SMALL | options)
    table = _table(space.engine_keys(SIZE, 7))
    model = space.latency_model(table, SIZE, 7)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        genotype = light_genotype(space, 0.9, generator)
        terms = model(space.one_hot(genotype))
        expected = _engine_sum(space, genotype, table, SIZE, 7)
        assert terms.searchable.item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(terms.edges.sum(), terms.cells.sum())


def test_engine_tables_have_the_parts_of_operation_tables_and_the_nodes():
    space = make_space({"name": "lgcnet"})
    engine, single = space.engine_keys((769, 1537), 19), space.lut_keys((769, 1537), 19)
    added = {key.op for key in set(engine) - set(single)}
    assert added == {"node.cell", "input.relu_conv_bn", "input.factorized_reduce"}
    # What remains of the 1x1 convolutions are the inputs of the fusion cell.
    assert {key.c_out for key in engine if key.op == "const.relu_conv_bn"} == {48}
    ones = space.latency_model(dict.fromkeys(engine, 1.0), (769, 1537), 19)
    both = space.latency_model(dict.fromkeys(single, 1.0), (769, 1537), 19)
    assert ones.constant == both.constant - 28


def test_an_engine_table_without_an_entry_is_refused():
    space = make_space(SMALL)
    table = _table(space.engine_keys(SIZE, 7))
    missing = next(key for key in table if key.op == "input.factorized_reduce")
    del table[missing]
    with pytest.raises(TableError, match="lacks the entry 'input.factorized_reduce"):
        space.latency_model(table, SIZE, 7)
