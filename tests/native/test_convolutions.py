"""Operations of 3x3 convolutions under the backend `cuda` against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgcnet_fast.ops import rectified_convolutions, use_backend
from lgcnet_fast.ops.conv3_kernels import (
    conv3_input_gradient,
    conv3_results,
    conv3_weight_gradients,
)
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.fan_out import aliases
from lgcnet_fast.ops.rectified_convolutions import fuses
from tests.native.truth import assert_close, nhwc

pytestmark = pytest.mark.usefixtures("cuda_backend")


def leaves_of(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [nhwc(torch.randn(shape)).requires_grad_() for shape in shapes]


def truth_of(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def with_gradients(maps: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    gs = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in maps]
    return [*maps, *torch.autograd.grad(maps, leaves, gs)]


def check(found: list[Tensor], wanted: list[Tensor], terms: int) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, torch.float32, terms)


@pytest.mark.parametrize("channels", [32, 48, 12, 6])
@pytest.mark.parametrize("edges", [1, 2])
def test_of_one_relu(channels: int, edges: int) -> None:
    """Channels that all kernels take, that those of the weights leave to torch, and that none."""
    weights = [(channels, channels, 3, 3)] * edges
    leaves = leaves_of((2, channels, 5, 7), *weights)
    assert fuses("cuda", leaves[0], channels) is (channels % 4 == 0)
    exact = truth_of(leaves)
    with use_backend("cuda"):
        found = with_gradients(rectified_convolutions(leaves[0], leaves[1:]), leaves)
    with use_backend("reference"):
        wanted = with_gradients(rectified_convolutions(exact[0], exact[1:]), exact)
    check(found, wanted, terms=9 * channels * edges)


def test_of_several_maps() -> None:
    """Two of equal shapes, one between other channels, one of another dilation, and a 1x1 one."""
    geometries = [*[Geometry(1, 1)] * 3, Geometry(1, 2, 2), Geometry()]
    leaves = leaves_of(
        *[(2, 32, 4, 6)] * 2, (2, 144, 3, 5), *[(2, 32, 4, 6)] * 2,
        *[(32, 32, 3, 3)] * 2, (48, 144, 3, 3), (32, 32, 3, 3), (32, 32, 1, 1),
    )  # fmt: skip
    exact = truth_of(leaves)
    with use_backend("cuda"):
        found = with_gradients(convolutions(leaves[:5], leaves[5:], geometries), leaves)
    with use_backend("reference"):
        wanted = with_gradients(convolutions(exact[:5], exact[5:], geometries), exact)
    check(found, wanted, terms=9 * 144)


def test_a_map_that_others_read_too() -> None:
    x, weight = leaves_of((1, 32, 3, 5), (32, 32, 3, 3))
    alias, other, *_ = aliases(x, "cuda")
    with use_backend("cuda"):
        (y,) = rectified_convolutions(alias, [weight])
    dx, _ = torch.autograd.grad((y * y).sum() + (3 * other).sum(), (x, weight))
    x, weight = truth_of([x, weight])
    y = torch.nn.functional.conv2d(x.relu(), weight, padding=1)
    wanted, _ = torch.autograd.grad((y * y).sum() + (3 * x).sum(), (x, weight))
    assert_close(dx, wanted, torch.float32, terms=9 * 32)


def test_maps_at_addresses_that_the_kernels_do_not_read() -> None:
    memory = torch.randn(1 + 2 * 3 * 5 * 32)
    x = memory[1:].view(2, 3, 5, 32).movedim(-1, 1).requires_grad_()
    (weight,) = leaves_of((32, 32, 3, 3))
    exact = truth_of([x, weight])
    with use_backend("cuda"):
        found = with_gradients(rectified_convolutions(x, [weight]), [x, weight])
    with use_backend("reference"):
        wanted = with_gradients(rectified_convolutions(exact[0], exact[1:]), exact)
    check(found, wanted, terms=9 * 32)


def test_registration() -> None:
    x, g, weight = (one.detach() for one in leaves_of(*[(1, 32, 3, 5)] * 2, (32, 32, 3, 3)))
    torch.library.opcheck(conv3_results, (x, [weight], "cuda", True))
    torch.library.opcheck(conv3_input_gradient, ([g], x, [weight], "cuda", True))
    torch.library.opcheck(conv3_weight_gradients, ([g], [x], [weight], "cuda", True))
