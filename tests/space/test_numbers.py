"""Parameters, multiply-adds and sizes of the paper's network, to the last digit."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lgcnet_fast.nn.fusion import derived_fusion_cell
from lgcnet_fast.nn.fusion_graphs import TOPDOWN13
from lgcnet_fast.nn.heads import Classifier
from lgcnet_fast.nn.operations import cell_operation
from lgcnet_fast.nn.stem import Stem
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.networks import derived_backbone
from lgcnet_fast.space.registry import make_space

INPUT = (1, 3, 769, 1537)
SIZES = {4: (193, 385), 8: (97, 193), 16: (49, 97)}


@pytest.fixture(scope="module")
def space():
    return make_space({"name": "lgcnet"})


def _genotype(space, cell_op="conv3", fusion_op="conv1", up_op="interp"):
    choice = {"cells": cell_op, "fusion": fusion_op, "up": up_op}
    arch = {
        group.name: torch.zeros(len(group.rows), len(group.options))
        for group in space.arch_groups()
    }
    for group in space.arch_groups():
        arch[group.name][:, group.options.index(choice[group.name])] = 1
    return space.discretise(arch)[0]


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.to("meta").eval()(*inputs)
    return counter.get_total_flops() // 2


def _map(channels: int, stride: int) -> torch.Tensor:
    return torch.empty(1, channels, *SIZES[stride], device="meta")


def test_stem():
    stem = Stem((8, 16, 32), (2, 2, 1))
    assert [_params(part) for part in stem.children()] == [232, 1_184, 4_672]
    x, found = torch.empty(INPUT, device="meta"), []
    for part in stem.children():
        found.append(round(_macs(part, x) / 1e5))
        x = part(x)
    assert found == [640, 856, 3424]


def test_preprocessing(space):
    cells = derived_backbone(_genotype(space, "skip")).cells
    found = [_params(cell.preprocess0) + _params(cell.preprocess1) for cell in cells]
    assert found == [1_664, 6_400, 12_544, *[16_640] * 5, 33_280, 49_664, *[66_048] * 4]


def test_static_total(space):
    backbone = derived_backbone(_genotype(space, "skip"))
    for cell in backbone.cells:
        cell.edges = nn.ModuleDict()
    assert _params(backbone) == 457_032
    assert round(_macs(backbone, torch.empty(INPUT, device="meta")) / 1e6) == 4_919


@pytest.mark.parametrize(
    "name, params, macs",
    [
        ("conv3", (9_280, 36_992, 147_712), (685, 690, 701)),
        ("sep3", (2_752, 9_600, 35_584), (195, 175, 167)),
        ("dil3_2", (1_376, 4_800, 17_792), (97, 87, 83)),
        ("dil3_4", (1_376, 4_800, 17_792), (97, 87, 83)),
        ("dil3_8", (1_376, 4_800, 17_792), (97, 87, 83)),
        ("skip", (0, 0, 0), (0, 0, 0)),
        ("max3", (0, 0, 0), (0, 0, 0)),
    ],
)
def test_cell_operations(name, params, macs):
    for (channels, stride), n, m in zip([(32, 4), (64, 8), (128, 16)], params, macs, strict=True):
        operation = cell_operation(name, channels)
        assert _params(operation) == n
        assert round(_macs(operation, _map(channels, stride)) / 1e6) == m


def test_strided_skip():
    found = [_params(cell_operation("skip", channels, stride=2)) for channels in (32, 64, 128)]
    assert found == [1_088, 4_224, 16_640]


@pytest.mark.parametrize(
    "op, up, params, gmacs", [("conv1", "interp", 43_104, 1.24), ("conv3", "deconv", 354_816, 9.78)]
)
def test_fusion_cell(op, up, params, gmacs):
    operations = {edge.name: op for edge in TOPDOWN13.op_edges}
    operations |= {edge.name: up for edge in TOPDOWN13.up_edges}
    cell = derived_fusion_cell(TOPDOWN13, (64, 128, 256), operations)
    features = [_map(64, 4), _map(128, 8), _map(256, 16)]
    assert _params(cell) == params
    assert _params(cell.reduce) == 21_792
    reductions = sum(
        _macs(reduce, feature) for reduce, feature in zip(cell.reduce, features, strict=True)
    )
    assert round(reductions / 1e6) == 402
    assert round(_macs(cell, features) / 1e7) == round(gmacs * 100)


def test_classifier():
    classifier = Classifier(48, 19)
    assert _params(classifier) == 931
    assert round(_macs(classifier, _map(48, 4)) / 1e5) == 678


def test_all_convolutions(space):
    assert _params(space.build(_genotype(space), 19)) == 6_273_547


def test_reference_genotype_has_the_published_counts(space):
    genotype = load_genotype("reference")
    light = sum(op in ("none", "max3", "skip") for cell in genotype.cells for op in cell)
    assert light == 30
    assert _params(space.build(genotype, 19)) == 2_089_931


def test_aspp_costs_about_what_the_paper_measures():
    gas = make_space({"name": "gas"})
    plain = make_space({"head": "none"})
    x = torch.empty(INPUT, device="meta")
    costs = [_macs(space.build(_genotype(space, "skip"), 19), x) for space in (gas, plain)]
    assert 4.2e9 < costs[0] - costs[1] < 4.8e9


def _output_sizes(space, size):
    """Size of every cell's output and of the logits."""
    network = space.build(_genotype(space, "skip"), 19).to("meta").eval()
    sizes = []

    def watched(end, *inputs):
        work = end(*inputs)

        def halves(*tensors):
            first, second = work.part.compute(*tensors)
            assert first.shape == second.shape
            sizes.append((2 * first.shape[1], *first.shape[2:]))
            return [first, second]

        return replace(work, part=replace(work.part, compute=halves))

    for cell in network.backbone.cells:
        cell.end = partial(watched, cell.end)
    logits = network(torch.empty(1, 3, *size, device="meta"))
    return sizes, tuple(logits.shape)


@pytest.mark.parametrize(
    "size, at4, at8, at16",
    [
        ((769, 1537), (193, 385), (97, 193), (49, 97)),
        ((769, 769), (193, 193), (97, 97), (49, 49)),
        ((720, 960), (180, 240), (90, 120), (45, 60)),
        ((97, 193), (25, 49), (13, 25), (7, 13)),
        ((90, 120), (23, 30), (12, 15), (6, 8)),
    ],
)
def test_sizes(space, size, at4, at8, at16):
    sizes, logits = _output_sizes(space, size)
    assert sizes == [(64, *at4)] + [(128, *at8)] * 7 + [(256, *at16)] * 6
    assert logits == (1, 19, *at4)


def test_layout(space):
    """The table of section 2.1: input channels and strides of every cell."""
    rows = [
        (c.c_in0, c.stride_in0, c.c_in1, c.stride_in1, c.channels, c.reduction, c.reduce_first)
        for c in space.layout.cells
    ]
    assert rows == [
        (16, 4, 32, 4, 32, False, False),
        (32, 4, 64, 4, 64, True, False),
        (64, 4, 128, 8, 64, False, True),
        *[(128, 8, 128, 8, 64, False, False)] * 5,
        (128, 8, 128, 8, 128, True, False),
        (128, 8, 256, 16, 128, False, True),
        *[(256, 16, 256, 16, 128, False, False)] * 4,
    ]
