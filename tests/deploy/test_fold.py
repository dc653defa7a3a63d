"""Folded networks compute what derived networks compute, and hold nothing that does not count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.operations import Concatenation, Constant, Convolution, Resizing
from lgcnet_fast.deploy.program import FoldedNetwork
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.nn.operations import CELL_OPS, FUSION_OPS, UP_OPS
from lgcnet_fast.ops import upsample
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.registry import make_space
from tests.deploy.networks import CLASSES, genotype_of, small_space, sparse_genotype, trained

HEADS = [
    {"head": "dcfc"},
    {"head": "dcfc", "fusion": "grid13"},
    {"head": "mscell"},
    {"head": "aspp"},
    {"head": "ppm"},
    {"head": "none"},
    {"name": "gas"},
]
SIZES = [(65, 97), (49, 66), (37, 21)]


@torch.inference_mode()
def largest_difference(
    network: nn.Module, folded: nn.Module, size: tuple[int, int] = (49, 66)
) -> float:
    """Between the logits, as a share of the largest logit."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, found = network(x), folded(x)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def assert_equal(network: nn.Module, size: tuple[int, int] = (49, 66)) -> FoldedNetwork:
    folded = fold(network)
    assert largest_difference(network, folded, size) < 1e-9
    return folded


@pytest.mark.parametrize("op", [op for op in CELL_OPS if op != "none"])
def test_every_cell_operation(op: str) -> None:
    space = small_space(head="none")
    assert_equal(trained(space, genotype_of(space, cells=op)))


@pytest.mark.parametrize("graph", ["topdown13", "grid13"])
@pytest.mark.parametrize("op", FUSION_OPS)
def test_every_fusion_operation(op: str, graph: str) -> None:
    space = small_space(fusion=graph)
    assert_equal(trained(space, genotype_of(space, cells="skip", fusion=op)))


@pytest.mark.parametrize("graph", ["topdown13", "grid13"])
@pytest.mark.parametrize("op", UP_OPS)
@pytest.mark.parametrize("size", SIZES)
def test_every_up_operation(op: str, graph: str, size: tuple[int, int]) -> None:
    space = small_space(fusion=graph)
    assert_equal(trained(space, genotype_of(space, cells="conv3", up=op)), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_every_head(options: dict[str, str], size: tuple[int, int]) -> None:
    space = small_space(**options)
    network = trained(space, space.random_genotype(torch.Generator().manual_seed(2)))
    folded = assert_equal(network, size)
    assert folded.output_stride == network.output_stride


@pytest.mark.parametrize(
    "options",
    [
        {"stem_strides": [2, 1, 2]},
        {"stem_strides": [1, 2, 2]},
        {"reductions": [1, 2]},
        {"cells": 4, "reductions": [2, 3]},
        {"widths": [5, 9, 17]},
    ],
    ids=str,
)
def test_other_macro_layouts(options: dict[str, object]) -> None:
    space = small_space(**options)
    assert_equal(trained(space, space.random_genotype(torch.Generator().manual_seed(3))))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("head", ["dcfc", "ppm", "none"])
def test_networks_of_many_none_edges(head: str, seed: int) -> None:
    space = small_space(cells=8, reductions=[2, 5], head=head)
    assert_equal(trained(space, sparse_genotype(space, seed)), (37, 21))


def test_one_pixel() -> None:
    space = small_space()
    assert_equal(trained(space, genotype_of(space)), (1, 1))


def test_the_reference_network() -> None:
    space = make_space({"name": "lgcnet"})
    assert_equal(trained(space, load_genotype("reference")), (65, 129))


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_label_maps_in_float32_agree_where_the_margin_counts(seed: int) -> None:
    space = small_space()
    genotype = space.random_genotype(torch.Generator().manual_seed(seed))
    network = trained(space, genotype, seed).float()
    x = torch.randn(1, 3, 97, 129, generator=torch.Generator().manual_seed(seed))
    expected, found = (upsample(net(x), (97, 129)) for net in (network, fold(network)))
    first, second = expected.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-3
    assert clear.float().mean() > 0.9
    assert torch.equal(expected.argmax(1)[clear], found.argmax(1)[clear])


def test_the_folded_network_is_independent_and_keeps_dtype() -> None:
    space = small_space()
    network = trained(space, genotype_of(space)).float()
    folded = fold(network)
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.state_dict().items())
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


# -- nothing dead ---------------------------------------------------------------------------------


def assert_every_weight_counts(network: nn.Module) -> None:
    """Every input channel of every weight has a gradient."""
    folded = fold(network)
    folded.requires_grad_(True)
    # Without ReLUs no channel is silent by chance.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", lambda x: x)
        folded(torch.randn(1, 3, 33, 33, dtype=torch.float64)).square().sum().backward()
    for name, parameter in folded.named_parameters():
        assert parameter.grad is not None, name
        used = parameter.grad.abs().flatten(1).amax(1) if parameter.dim() > 1 else parameter.grad
        assert (used != 0).all(), name
        if parameter.dim() == 4:
            assert (parameter.grad.abs().amax((0, 2, 3)) > 0).all(), name


@pytest.mark.parametrize("head", ["dcfc", "aspp", "ppm", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_no_parameter_is_dead(head: str, seed: int) -> None:
    space = small_space(cells=8, reductions=[2, 5], head=head)
    assert_every_weight_counts(trained(space, sparse_genotype(space, seed)))


def genotype_with(space, **cells: tuple[str, ...]):
    """conv3 everywhere, but `cell3=(five operations)`."""
    values = genotype_of(space, cells="conv3").model_dump()
    rows = [list(cell) for cell in values["cells"]]
    for name, ops in cells.items():
        rows[int(name.removeprefix("cell"))] = list(ops)
    return space.Genotype.model_validate(values | {"cells": rows})


NONE, SKIP, CONV = "none", "skip", "conv3"


def test_a_preprocess_that_nothing_reads_is_dropped_with_what_only_it_reads() -> None:
    space = small_space(head="none")
    genotype = genotype_with(space, cell4=(CONV, NONE, CONV, NONE, CONV))
    folded = assert_equal(trained(space, genotype))
    names = {step.name for step in folded.steps}
    assert "cell4/preprocess0" in names and "cell4/preprocess1" not in names
    assert not any(name.startswith("cell3") for name in names)


def test_a_node_that_no_operation_reaches_is_not_stored() -> None:
    space = small_space(head="none")
    genotype = genotype_with(space, cell3=(NONE, NONE, CONV, NONE, SKIP))
    folded = assert_equal(trained(space, genotype))
    reader = folded.operations["cell4/preprocess1"]
    assert isinstance(reader, Convolution) and reader.weight.shape[1] == 16
    assert "cell3" not in folded.operations and "cell3/x1" not in folded.operations


@pytest.mark.parametrize("op", ["conv3", "sep3", "dil3_4"])
def test_operations_on_zeros_leave_their_bias(op: str) -> None:
    space = small_space(head="none")
    genotype = genotype_with(space, cell2=(NONE, NONE, NONE, NONE, op))
    folded = assert_equal(trained(space, genotype))
    assert any(isinstance(module, Constant) for module in folded.modules())


def test_an_empty_cell_leaves_the_bias_of_what_reads_it() -> None:
    space = small_space(head="none")
    genotype = genotype_with(space, cell2=(NONE,) * 5)
    folded = assert_equal(trained(space, genotype))
    assert isinstance(folded.operations["cell3/preprocess1"], Constant)


# -- the program ----------------------------------------------------------------------------------


def test_maps_are_released_after_their_last_reader() -> None:
    space = small_space()
    folded = fold(trained(space, genotype_of(space)))
    released = [name for names in folded._released for name in names]
    made = ["image", *(step.name for step in folded.steps)]
    assert sorted(released) == sorted(made[:-1])
    for step, names in zip(folded.steps, folded._released, strict=True):
        assert set(names) <= set(step.inputs)


def test_strides_of_the_steps_say_their_sizes() -> None:
    space = small_space(fusion="grid13")
    folded = fold(trained(space, genotype_of(space)))
    strides = {"image": 1} | {step.name: step.stride for step in folded.steps}
    sizes: dict[str, tuple[int, int]] = {}
    for step in folded.steps:
        step.operation.register_forward_hook(
            lambda _, __, out, name=step.name: sizes.update({name: tuple(out.shape[2:])})
        )
    folded(torch.randn(1, 3, 37, 50, dtype=torch.float64))
    for name, size in sizes.items():
        assert size == (-(-37 // strides[name]), -(-50 // strides[name])), name
    assert any(isinstance(step.operation, Resizing | Concatenation) for step in folded.steps)


def test_networks_of_other_spaces_are_refused() -> None:
    with pytest.raises(ConfigError, match="Sequential"):
        fold(nn.Sequential(nn.Conv2d(3, CLASSES, 1)))
