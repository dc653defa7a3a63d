"""Acceptance checks of the supernet and the derived network."""

import re

import pytest
import torch
from torch import nn

from lgcnet_fast.nn.fusion import FusionCell
from lgcnet_fast.nn.primitives import Source
from lgcnet_fast.space.base import Arch
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.space.sampling import gumbel_softmax

SMALL = {"cells": 5, "reductions": [1, 3], "widths": [4, 8, 16]}
HEADS = [
    {"head": "dcfc"},
    {"head": "dcfc", "fusion": "grid13"},
    {"head": "mscell"},
    {"head": "aspp"},
    {"head": "ppm"},
    {"head": "none"},
    {"name": "gas"},
]
SIZES = [(97, 193), (65, 65), (90, 120)]
CLASSES = 5


def _space(**options):
    return make_space(SMALL | options)


def _sample(space, seed=0, temperature=1.0) -> Arch:
    torch.manual_seed(seed)
    arch = space.build_arch()
    generator = torch.Generator().manual_seed(seed)
    return gumbel_softmax(arch(), temperature, generator, space.arch_groups())


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_paper_has_70_cell_edges_and_13_fusion_edges():
    shapes = {
        group.name: (len(group.rows), len(group.options))
        for group in make_space({"name": "lgcnet"}).arch_groups()
    }
    assert shapes == {"cells": (70, 8), "fusion": (6, 10), "up": (7, 2)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_odd_and_even_inputs(options, size):
    space = _space(**options)
    stride = {"dcfc": 4, "mscell": 8}.get(space.options.head, 16)
    expected = (2, CLASSES, *(-(-n // stride) for n in size))
    x = torch.randn(2, 3, *size)
    supernet = space.build_supernet(CLASSES)
    assert supernet.output_stride == stride
    assert supernet(x, _sample(space)).shape == expected
    derived = space.build(space.random_genotype(_generator()), CLASSES)
    assert derived.output_stride == stride
    assert derived(x).shape == expected


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_cells_make_no_plain_output_for_a_fusion_cell(options):
    space = _space(**options)
    genotype = space.random_genotype(_generator())
    fused = genotype.fusion is not None
    for network in (space.build_supernet(CLASSES), space.build(genotype, CLASSES)):
        assert network.backbone.taps_rectified is isinstance(network.neck, FusionCell) is fused
    features = network.eval().backbone(torch.randn(1, 3, 33, 33))
    assert all(isinstance(feature, Source if fused else torch.Tensor) for feature in features)
    classifier = space.build_classifier(genotype, CLASSES)
    assert not classifier.backbone.taps_rectified


@pytest.mark.parametrize("taps", [[0, 5, 13], [0, 6, 13], [0, 7, 10], [0, 7, 11], [0, 7, 12]])
def test_tap_triples(taps):
    space = make_space({"widths": [4, 8, 16], "taps": taps})
    x = torch.randn(1, 3, 65, 65)
    assert space.build_supernet(CLASSES)(x, _sample(space)).shape == (1, CLASSES, 17, 17)
    genotype = space.random_genotype(_generator())
    assert genotype.taps == tuple(taps) and len(genotype.cells) == taps[-1] + 1
    assert space.build(genotype, CLASSES).eval()(x).shape == (1, CLASSES, 17, 17)


@pytest.mark.parametrize(
    "options",
    [
        {"stem_strides": [2, 1, 2]},
        {"stem_strides": [1, 2, 2]},
        {"stem_widths": [16, 32, 32]},
        {"reductions": [1, 2]},
        {"cells": 4, "reductions": [2, 3]},
    ],
    ids=str,
)
def test_other_macro_layouts(options):
    space = _space(**options)
    x = torch.randn(2, 3, 49, 66)
    assert space.build_supernet(CLASSES)(x, _sample(space)).shape == (2, CLASSES, 13, 17)
    derived = space.build(space.random_genotype(_generator()), CLASSES)
    assert derived(x).shape == (2, CLASSES, 13, 17)


@pytest.mark.parametrize("options", [*HEADS, {"communication": "gcn_opid"}], ids=str)
def test_one_backward_reaches_everything(options):
    space = _space(**options)
    arch, supernet = space.build_arch(), space.build_supernet(CLASSES)
    z = gumbel_softmax(arch(), 1.0, _generator(), space.arch_groups())
    supernet(torch.randn(2, 3, 65, 65), z).square().mean().backward()
    for name, parameter in (*arch.named_parameters(), *supernet.named_parameters()):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gamma_zero_equals_independent_bit_for_bit():
    found = []
    for options in ({"communication": "gcn", "gamma": 0.0}, {"communication": "independent"}):
        space = _space(**options)
        z = _sample(space, seed=3)
        torch.manual_seed(4)
        supernet = space.build_supernet(CLASSES)
        x = torch.randn(2, 3, 49, 49)
        found.append(supernet(x, z))
    assert torch.equal(*found)


def _without_pool_norm(supernet: nn.Module) -> None:
    for name, module in supernet.named_modules():
        if name.endswith("candidates.max3"):
            module[1] = nn.Identity()


def _derived_weights(supernet: nn.Module, genotype) -> dict[str, torch.Tensor]:
    """Weights of the chosen candidates under the derived network's names."""
    weights = {}
    for name, value in supernet.state_dict().items():
        edge = re.match(r"(?:backbone\.cells\.(\d+)|neck)\.edges\.(\w+)\.candidates\.(\w+)\.", name)
        if edge:
            cell, place, option = edge.groups()
            ops = genotype.cells[int(cell)] if cell else genotype.fusion.ops
            if ops[int(place) if cell else place] != option:
                continue
            name = name.replace(f".candidates.{option}", "")
        weights[name] = value
    return weights


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_derived_network_equals_the_supernet_under_one_hot_z(options, seed):
    space = _space(**options)
    torch.manual_seed(seed)
    supernet = space.build_supernet(CLASSES).double()
    x = torch.randn(2, 3, 49, 66, dtype=torch.float64)
    supernet(x, {k: v.double() for k, v in _sample(space, seed).items()})
    supernet.eval()
    _without_pool_norm(supernet)

    genotype = space.random_genotype(_generator(seed))
    derived = space.build(genotype, CLASSES).double().eval()
    keys = derived.load_state_dict(_derived_weights(supernet, genotype), strict=False)
    assert not keys.unexpected_keys
    norms = {name for name, m in derived.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(key.rpartition(".")[0] in norms for key in keys.missing_keys)

    z = {name: rows.double() for name, rows in space.one_hot(genotype).items()}
    torch.testing.assert_close(derived(x), supernet(x, z), rtol=1e-9, atol=1e-9)


def test_an_exported_network_has_no_architecture_parameters():
    space = _space()
    arch = dict(space.build_arch().named_parameters())
    assert any("reasoning" in name for name in arch)
    derived = space.build(space.random_genotype(_generator()), CLASSES)
    names = " ".join(derived.state_dict())
    assert not re.search("alpha|reasoning|candidates|fusion_cell", names)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_pretraining_classifier_shares_the_backbone(options):
    space = _space(**options)
    genotype = space.random_genotype(_generator())
    classifier = space.build_classifier(genotype, 7)
    assert classifier(torch.randn(2, 3, 48, 48)).shape == (2, 7)
    segmenter = space.build(genotype, CLASSES)
    segmenter.backbone.load_state_dict(classifier.backbone.state_dict())


def test_search_width_mult_narrows_the_supernet_only():
    space = _space(search_width_mult=0.5)
    supernet = space.build_supernet(CLASSES)
    assert [cell.preprocess1[1].out_channels for cell in supernet.backbone.cells] == [
        2, 4, 4, 8, 8
    ]  # fmt: skip
    assert space.random_genotype(_generator()).widths == (4, 8, 16)
    full = _space()
    assert space.lut_keys((97, 193), 5) == full.lut_keys((97, 193), 5)
    assert supernet(torch.randn(2, 3, 33, 33), _sample(space)).shape == (2, CLASSES, 9, 9)


def test_channels_last_survives_to_the_logits():
    space = _space()
    derived = space.build(space.random_genotype(_generator()), CLASSES)
    derived = derived.to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 3, 65, 65).contiguous(memory_format=torch.channels_last)
    assert derived(x).is_contiguous(memory_format=torch.channels_last)


def test_same_seed_same_weights():
    for build in (lambda s: s.build_supernet(3), lambda s: s.build_arch()):
        states = []
        for _ in range(2):
            torch.manual_seed(11)
            states.append(build(_space()).state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
