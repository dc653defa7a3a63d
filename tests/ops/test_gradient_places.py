"""Gradients that operations write where an optimiser wants them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lgcnet_fast.ops import cast_together, separable_branches, use_backend
from lgcnet_fast.ops.gradient_places import GradientPlaces, homes, in_their_places, taken

SHAPES = [(4, 3, 3, 3), (5, 4, 1, 1), (4,)]


def leaves(device: torch.device, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Whose 4-dimensional ones lie channels last."""
    torch.manual_seed(0)
    found = []
    for shape in shapes:
        value = torch.randn(shape, device=device)
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        found.append(value.requires_grad_())
    return found


def places_of(parameters: Sequence[Tensor]) -> tuple[GradientPlaces, list[Tensor]]:
    views = [torch.full_like(parameter, torch.nan) for parameter in parameters]
    return GradientPlaces(parameters, lambda: (views[0], views)), views


def lie(parameters: Sequence[Tensor], views: Sequence[Tensor]) -> list[bool]:
    pairs = zip(parameters, views, strict=True)
    return [p.grad is not None and p.grad.data_ptr() == view.data_ptr() for p, view in pairs]


def by_cast(parameters: Sequence[Tensor]) -> Tensor:
    copies = cast_together(parameters, torch.bfloat16)
    return sum((copy.float() * (index + 1)).square().sum() for index, copy in enumerate(copies))


def by_branches(parameters: Sequence[Tensor]) -> Tensor:
    """An edge of two branches."""
    torch.manual_seed(1)
    x = torch.randn(1, 4, 3, 5, device=parameters[0].device)
    maps = separable_branches(x, parameters[:2], parameters[2:], [1, 2])
    return sum(y.square().sum() for entry in maps for y in entry)


CASES = [(by_cast, SHAPES), (by_branches, [(4, 1, 3, 3)] * 2 + [(3, 4, 1, 1)] * 2)]


@pytest.mark.parametrize("loss, shapes", CASES)
def test_gradients_are_written_there_and_then_added(
    loss: Callable[[Sequence[Tensor]], Tensor],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> None:
    own, others = leaves(device, shapes), leaves(device, shapes)
    places, views = places_of(own)
    with use_backend("triton"):
        loss(others).backward()
        once = [other.grad.clone() for other in others]
        loss(others).backward()
        loss(own).backward()
        assert not any(lie(own, views)) and all(view.isnan().all() for view in views)
        for rounds in range(2):
            for parameter, view in zip(own, views, strict=True):
                parameter.grad = None
                view.fill_(torch.nan)
            places.offer()
            loss(own).backward()
            assert all(lie(own, views)), rounds
            assert all(torch.equal(p.grad, g) for p, g in zip(own, once, strict=True))
            loss(own).backward()
    assert all(lie(own, views))
    assert all(torch.equal(p.grad, other.grad) for p, other in zip(own, others, strict=True))


@pytest.mark.parametrize("loss, shapes", CASES)
def test_of_two_gradients_of_a_weight_one_is_written_there(
    loss: Callable[[Sequence[Tensor]], Tensor],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> None:
    own, others = leaves(device, shapes), leaves(device, shapes)
    places, _ = places_of(own)
    places.offer()
    with use_backend("triton"):
        for parameters in (own, others):
            (loss(parameters) + 2 * loss(parameters)).backward()
    for parameter, other in zip(own, others, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_aliases_have_the_place_of_their_parameter_once(device: torch.device) -> None:
    own = leaves(device)
    places, views = places_of(own)
    alias, computed = own[0].detach().requires_grad_(), own[1] * 1
    assert taken(homes([alias])[0]) is None
    places.offer()
    assert homes([computed]) == [None] and taken(None) is None
    place = taken(homes([alias])[0])
    assert place.data_ptr() == views[0].data_ptr() and place is not views[0]
    assert taken(homes(own)[0]) is None


def test_no_place_for_a_parameter_that_has_a_gradient_or_has_moved(device: torch.device) -> None:
    own = leaves(device)
    places, _ = places_of(own)
    places.offer()
    before = homes(own)
    own[0].grad = torch.zeros_like(own[0])
    own[1].data = own[1].detach().clone()
    assert taken(before[0]) is None
    assert taken(before[1]) is None and taken(homes(own)[1]) is None
    assert taken(before[2]) is not None


def test_gradients_of_another_order_stay_where_they_are(device: torch.device) -> None:
    own = leaves(device)
    places, views = places_of(own)
    places.offer()
    gradients = [torch.randn(weight.shape, device=device) for weight in own]
    found = in_their_places(homes(own), gradients)
    assert found[0] is gradients[0]
    for place, view, gradient in list(zip(found, views, gradients, strict=True))[1:]:
        assert place.data_ptr() == view.data_ptr() and torch.equal(place, gradient)


def test_places_go_with_their_optimiser(device: torch.device) -> None:
    own = leaves(device)
    places, _ = places_of(own)
    places.offer()
    del places
    gc.collect()
    assert taken(homes(own)[0]) is None
