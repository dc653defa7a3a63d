"""Gradients of a map that the launch of one of them adds up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from lgcnet_fast.kernels import depthwise_input_grad, gradient_sum
from lgcnet_fast.native import depthwise_branches
from lgcnet_fast.ops import (
    Products,
    fan_out,
    fused_depthwise_branches,
    readers,
    rectified_convolutions,
    use_backend,
)
from lgcnet_fast.ops import fused_separable_branches as fused
from lgcnet_fast.ops.deferred_gradient import DeferredGradient
from lgcnet_fast.ops.fan_out import add_gradients, added_to, aliases
from lgcnet_fast.ops.fused_separable_branches import stacked_matrices, stacked_windows
from lgcnet_fast.ops.separable_branches import separable_branches
from tests.combinations import some_combinations

DILATIONS = (1, 2)


def leaves(device: torch.device, channels: int = 3) -> list[Tensor]:
    """x and the weights of two branches of two edges."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 5, channels, dtype=torch.float64).movedim(-1, 1)
    windows = [torch.randn(channels, 1, 3, 3, dtype=torch.float64) for _ in range(4)]
    matrices = [torch.randn(2, channels, 1, 1, dtype=torch.float64) for _ in range(4)]
    return [one.to(device).requires_grad_() for one in (x, *windows, *matrices)]


def total(inputs: Sequence[Tensor], others: int, stride: int = 1, operations: int = 1) -> Tensor:
    """Of branches of a map, and of so many other readers of it."""
    x, *weights = inputs
    source = readers(x)
    terms = [(k + 1) * source.plain().square().sum() for k in range(others)]
    for _ in range(operations):
        branches = (source.plain(), weights[:4], weights[4:], DILATIONS, stride)
        maps = separable_branches(*branches, (1, 1, 1, 1), (True, False))
        every = [y for stack in maps for y in stack]
        raw = [y.multiplied() if isinstance(y, Products) else [y] for y in every]
        terms += [y.square().sum() for one in raw for y in one]
    return torch.stack(terms).sum()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches that give a gradient of a map."""
    found: list[str] = []

    def noted(run: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        found.append(run.__name__)
        return run(*arguments, **options)

    for module, name in (
        (depthwise_input_grad, "depthwise_multi_input_grad"),
        (gradient_sum, "gradient_sum"),
    ):
        monkeypatch.setattr(module, name, partial(noted, getattr(module, name)))
    return found


@some_combinations("case, pay", [(0, 1), (1, 1), (5, 1), (2, 2)], (False, True))
def test_one_launch_adds_all_gradients(
    case: tuple[int, int],
    pay: bool,
    device: torch.device,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_depthwise_branches, "pay", lambda *arguments: pay)
    others, stride = case
    inputs, found = leaves(device), []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            out = total(inputs, others, stride)
        found.append(torch.autograd.grad(out, inputs, retain_graph=True))
    torch.testing.assert_close(*found)
    again = torch.autograd.grad(out, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found[1], again, strict=True))
    assert launches == ["depthwise_multi_input_grad"] * 2


def both_gradients(
    dys: Sequence[Tensor], x: Tensor, windows: Tensor, dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """What the kernel of sm_90 gives, two shares of the weights'."""
    dx, dws = torch.zeros_like(x), []
    for k, dy in enumerate(dys):
        d = dilations[k % len(dilations)]
        window = windows.flatten(0, 1)[k].to(x.dtype).permute(2, 0, 1)[:, None]
        options = {"padding": d, "dilation": d, "groups": x.shape[1]}
        dx += conv2d_input(x.shape, window, dy, **options) * (x > 0)
        dws.append(conv2d_weight(x.relu(), window.shape, dy, **options)[:, 0].permute(1, 2, 0))
    dw = torch.stack(dws).view_as(windows).float()
    return dx, torch.stack((0.25 * dw, 0.75 * dw))


@pytest.mark.parametrize("pay", [False, True])
@pytest.mark.parametrize("others", [0, 1, 5])
def test_a_launch_of_both_gradients_waits_for_no_others(
    others: int,
    pay: bool,
    device: torch.device,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_depthwise_branches, "pay", lambda *arguments: pay)
    monkeypatch.setattr(depthwise_branches, "refusal", lambda *arguments: None)
    monkeypatch.setattr(depthwise_branches, "depthwise_branches_backward", both_gradients)
    inputs, found = leaves(device), []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            found.append(torch.autograd.grad(total(inputs, others), inputs))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)  # The kernel takes float32 weights.
    assert launches == (["gradient_sum"] if others else [])


def test_two_operations_on_a_map(device: torch.device, launches: list[str]) -> None:
    inputs, found = leaves(device), []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            found.append(torch.autograd.grad(total(inputs, 1, operations=2), inputs))
    torch.testing.assert_close(*found)
    assert launches == ["depthwise_multi_input_grad"] * 2


def test_gradients_of_weights_alone(device: torch.device, launches: list[str]) -> None:
    inputs = leaves(device)
    with use_backend("triton"):
        out = total(inputs, 2)
    alone = torch.autograd.grad(out, inputs[1:], retain_graph=True)
    assert not launches
    torch.testing.assert_close(alone, torch.autograd.grad(out, inputs)[1:])


def test_a_map_of_its_own_dtype_only(device: torch.device, launches: list[str]) -> None:
    """Under autocast what the branches read is a copy."""
    inputs = [one.detach().float().requires_grad_() for one in leaves(device)]
    with use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        out = total(inputs, 1)
    assert torch.autograd.grad(out, inputs)[0].dtype == torch.float32
    assert launches == ["depthwise_multi_input_grad", "gradient_sum"]


def test_a_leaf_gets_a_plain_gradient(device: torch.device) -> None:
    inputs = leaves(device)
    with use_backend("triton"):
        total(inputs, 0).backward()
    assert type(inputs[0].grad) is Tensor


def test_operations_read_the_gradient_alone(device: torch.device) -> None:
    """Computed once."""
    x, calls = leaves(device)[0].detach(), []

    def compute(others: Sequence[Tensor]) -> Tensor:
        calls.append(len(others))
        return sum(others, start=2 * x)

    deferred = DeferredGradient(x, compute)
    assert deferred.stride() == x.stride() and not calls
    assert torch.equal(deferred + 1, 2 * x + 1) and type(deferred + 1) is Tensor
    assert deferred.data_ptr() == deferred.alone().data_ptr()
    assert calls == [0]
    assert torch.equal(deferred.plus([x, x]), 4 * x) and calls == [0, 2]


class Reader(torch.autograd.Function):
    """Of a map, whose gradient is what `wrap` makes of that of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wrap: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.wrap = wrap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.wrap(gradient), None


def test_others_are_added_in_the_place_of_a_gradient(device: torch.device) -> None:
    (x, *_), places = leaves(device), []

    def owned(gradient: Tensor) -> Tensor:
        dx = gradient.clone(memory_format=torch.channels_last)
        places.append(dx.data_ptr())
        return added_to(dx, x)

    first, second, third, *_ = aliases(x, "triton")
    out = second.square() + Reader.apply(first, owned) + third.pow(3)
    (found,) = torch.autograd.grad(out.sum(), x)
    assert type(found) is Tensor and [found.data_ptr()] == places
    torch.testing.assert_close(found, 2 * x + 1 + 3 * x.square())


def test_nothing_is_added_in_the_place_of_a_gradient_of_two_maps(device: torch.device) -> None:
    """The gradient of a sum is that of both terms, in one place."""
    x, y = leaves(device)[0], leaves(device)[0]

    def owned(gradient: Tensor) -> Tensor:
        return added_to(gradient.clone(memory_format=torch.channels_last), total)

    first, second, *_ = aliases(x, "triton")
    third, fourth, *_ = aliases(y, "triton")
    total, *_ = aliases(first + third, "triton")
    out = Reader.apply(total, owned) + second.square() + fourth.pow(3)
    found = torch.autograd.grad(out.sum(), (x, y))
    torch.testing.assert_close(found, (1 + 2 * x, 1 + 3 * y.square()))


def test_others_are_added_where_the_gradient_of_convolutions_lies(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 32, device=device).bfloat16().movedim(-1, 1).requires_grad_()
    weight = (torch.randn(32, 32, 3, 3, device=device) / 17).bfloat16().requires_grad_()
    added, add = [], fan_out.add_gradients

    def watched(dx: Tensor, others: Sequence[Tensor]) -> None:
        added.append((dx.data_ptr(), len(others)))
        add(dx, others)

    monkeypatch.setattr(fan_out, "add_gradients", watched)
    found = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            source = readers(x)
            (y,) = rectified_convolutions(source.plain(), [weight])
            out = y.float().square().sum() + source.plain().float().pow(3).sum()
        found.append(torch.autograd.grad(out, x)[0])
    assert added == [(found[1].data_ptr(), 1)]
    scale = found[0].abs().max().item()
    torch.testing.assert_close(found[1], found[0], rtol=2**-6, atol=2**-7 * scale)


def test_others_go_to_a_launch_that_adds_them(device: torch.device) -> None:
    """Rather than to a launch of their own, also if a gradient is there to be added to."""
    (x, *_), added = leaves(device), []

    def computing(gradient: Tensor) -> Tensor:
        def compute(others: Sequence[Tensor]) -> Tensor:
            added.append(len(others))
            return sum(others, start=2 * gradient)

        return DeferredGradient(x.detach(), compute)

    def owned(gradient: Tensor) -> Tensor:
        return added_to(gradient.clone(memory_format=torch.channels_last), x)

    first, second, *_ = aliases(x, "triton")
    out = Reader.apply(first, owned) + Reader.apply(second, computing)
    (found,) = torch.autograd.grad(out.sum(), x)
    assert added == [1]
    torch.testing.assert_close(found, torch.full_like(x, 3))


def test_registration(device: torch.device) -> None:
    check = torch.library.opcheck
    x, *weights = (one.detach().float() for one in leaves(device))
    windows, matrices = stacked_windows(weights[:4]), stacked_matrices(weights[4:], x)
    for stride in (1, 2):
        settings = (list(DILATIONS), stride)
        filtered, raw = fused.separable_maps(x, windows, matrices, *settings, "triton")
        maps = filtered.flatten(0, 1)
        arguments = (raw, filtered.clone(), x, windows, matrices, *settings, "triton")
        check(fused.separable_branches_weight_gradients, arguments)
        check(add_gradients, (x.clone(), [x, x]))
        for gradients, others in (([maps], []), (list(maps), [x, x])):
            launch = (gradients, x, windows, *settings, others)
            check(fused.branches_input_gradient, launch)
        for multiplied in ([], [0]):
            own = filtered[:, :1].clone() if multiplied else x.new_empty(0)
            products = matrices[::2].contiguous() if multiplied else x.new_empty(0)
            gradients = [raw[0][:1], maps[1:2], raw[1][:1], maps[3:]] if multiplied else [maps]
            known = (gradients, own, x, windows, products, *settings, multiplied)
            check(fused_depthwise_branches.depthwise_branches_weight_gradients, known)
