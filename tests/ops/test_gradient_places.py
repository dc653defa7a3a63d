"""Gradients that operations write where an optimiser wants them."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from lgcnet_fast.ops import cast_together, use_backend
from lgcnet_fast.ops.gradient_places import GradientPlaces, homes, taken

SHAPES = [(4, 3, 3, 3), (5, 4, 1, 1), (4,)]


def leaves(device: torch.device) -> list[Tensor]:
    """Whose 4-dimensional ones lie channels last."""
    torch.manual_seed(0)
    found = []
    for shape in SHAPES:
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


def loss(parameters: Sequence[Tensor]) -> Tensor:
    copies = cast_together(parameters, torch.bfloat16)
    return sum((copy.float() * (index + 1)).square().sum() for index, copy in enumerate(copies))


def test_gradients_are_written_there_and_then_added(device: torch.device) -> None:
    own, others = leaves(device), leaves(device)
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


def test_of_two_gradients_of_a_weight_one_is_written_there(device: torch.device) -> None:
    own, others = leaves(device), leaves(device)
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


def test_places_go_with_their_optimiser(device: torch.device) -> None:
    own = leaves(device)
    places, _ = places_of(own)
    places.offer()
    del places
    gc.collect()
    assert taken(homes(own)[0]) is None
