"""The forms that programs are exported in compute what the folded network computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.deploy.export_check import check_sizes
from lgcnet_fast.deploy.export_program import ExportProgram, _binned_mean
from lgcnet_fast.deploy.export_torch import trace
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.ops import upsample_argmax
from tests.combinations import some_cases
from tests.deploy.networks import genotype_of, small_space, sparse_genotype, trained

SIZES = [(33, 65), (48, 50), (71, 34), (64, 97)]
CELLS = {"cells": 4, "reductions": [1, 2]}
NETWORKS = [
    ({}, {"cells": "max3", "fusion": "gp2", "up": "deconv"}),
    ({}, {"cells": "skip", "fusion": "gp5", "up": "interp"}),
    ({"fusion": "grid13"}, {}),
    ({"head": "mscell"}, {"fusion": "gp1"}),
    ({"head": "ppm"}, {}),
    ({"head": "aspp"}, {}),
    ({"name": "gas"}, {}),
]


def network_of(options: dict, chosen: dict) -> torch.nn.Module:
    space = small_space(**CELLS | options)
    return trained(space, genotype_of(space, **chosen)).float()


def image_of(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("options", "chosen"), NETWORKS, ids=str)
def test_programs_equal_the_network(options: dict, chosen: dict, dynamic: bool) -> None:
    network = network_of(options, chosen)
    program = ExportProgram(fold(network), labels=False, dynamic=dynamic)
    with torch.no_grad():
        for size in SIZES:
            image = image_of(size)
            torch.testing.assert_close(
                program(image), network(network_input(image, None)), rtol=1e-4, atol=1e-4
            )


def test_dead_branches_are_exportable() -> None:
    space = small_space(**CELLS)
    network = trained(space, sparse_genotype(space, seed=2)).float()
    program = ExportProgram(fold(network), labels=False, dynamic=True)
    image = image_of((33, 50))
    with torch.no_grad():
        expected = network(network_input(image, None))
        torch.testing.assert_close(program(image), expected, rtol=1e-4, atol=1e-4)


def test_labels_have_the_size_of_the_image() -> None:
    network = network_of({}, {})
    image = image_of((45, 70))
    with torch.no_grad():
        labels = ExportProgram(fold(network), labels=True, dynamic=True)(image)
        expected = upsample_argmax(network(network_input(image, None)), (45, 70))
    assert labels.shape == (1, 45, 70) and labels.dtype == torch.uint8
    assert (labels == expected).float().mean() > 0.999


@pytest.mark.parametrize("bins", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("size", [(6, 6), (7, 13), (5, 1), (2, 3)])
def test_binned_means_are_adaptive_pooling(bins: int, size: tuple[int, int]) -> None:
    x = torch.randn(1, 4, *size)
    torch.testing.assert_close(_binned_mean(x, bins), F.adaptive_avg_pool2d(x, bins))


@some_cases("case", NETWORKS[:3], 0, 2)
def test_one_trace_serves_every_size(case: tuple[dict, dict]) -> None:
    network = network_of(*case)
    program = ExportProgram(fold(network), labels=True, dynamic=True).eval()
    traced = trace(program, image_of((97, 161)), dynamic=True).module()
    for size in (*SIZES, (128, 255)):
        image = image_of(size)
        assert torch.equal(traced(image), program(image)), size


def test_checked_sizes_are_odd_and_even_and_in_range() -> None:
    assert check_sizes((360, 480), dynamic=False) == ((360, 480),)
    for size in ((360, 480), (769, 1537), (32, 16384)):
        sizes = check_sizes(size, dynamic=True)
        assert size in sizes
        assert all(32 <= side <= 16384 for size in sizes for side in size)
        assert {height % 2 for height, _ in sizes} == {0, 1}
        assert {width % 2 for _, width in sizes} == {0, 1}
