"""Optimisers for captured steps compute what torch's do, and read torch's checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lgcnet_fast.ops.cast_together import _CastTogether
from lgcnet_fast.train import optimisers, stretch
from lgcnet_fast.train.ema import MovingAverage
from lgcnet_fast.train.optimisers import SGD, Adam
from lgcnet_fast.train.precision import Precision
from lgcnet_fast.train.schedules import DeviceScalar

CPU = torch.device("cpu")
OPTIONS = {
    SGD: {"momentum": 0.9, "weight_decay": 1e-2},
    Adam: {"lr": 0.01, "betas": (0.5, 0.99), "weight_decay": 1e-2},
}


def model() -> nn.Module:
    """The last layer stands aside, as operations without a path to the output do."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(4, 3), nn.Linear(2, 2)])


def ours(kind, network):
    if kind is SGD:
        return SGD(network.parameters(), DeviceScalar(0.1, CPU), **OPTIONS[SGD])
    return Adam(network.parameters(), **OPTIONS[Adam])


def theirs(kind, network):
    if kind is SGD:
        return torch.optim.SGD(network.parameters(), lr=0.1, **OPTIONS[SGD])
    return torch.optim.Adam(network.parameters(), **OPTIONS[Adam])


def train(network, optimiser, steps):
    inputs = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimiser.zero_grad()
        network[0](torch.randn(5, 4, generator=inputs)).square().sum().backward()
        optimiser.step()


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_steps_are_those_of_torch(kind):
    first, second = model(), model()
    train(first, ours(kind, first), 4)
    train(second, theirs(kind, second), 4)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_checkpoints_of_torch_continue(kind):
    """As of a run that began before steps were captured, or on a device without fused steps."""
    first, second = model(), model()
    before, after = theirs(kind, first), ours(kind, second)
    train(first, before, 3)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.param_groups[0]["fused"]
    train(first, before, 2)
    train(second, after, 2)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)
    assert len(after.state) == 4


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_torch_reads_our_checkpoints(kind):
    first, second = model(), model()
    before, after = ours(kind, first), theirs(kind, second)
    train(first, before, 3)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert isinstance(after.param_groups[0]["lr"], float)
    train(first, before, 2)
    train(second, after, 2)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_state_exists_before_the_first_step_and_stays_where_it_is(kind):
    network = model()
    optimiser = ours(kind, network)
    before = {name: t.data_ptr() for s in optimiser.state.values() for name, t in s.items()}
    train(network, optimiser, 2)
    after = {name: t.data_ptr() for s in optimiser.state.values() for name, t in s.items()}
    assert before and before == after


def test_the_schedule_sets_the_rate_also_after_loading():
    network, lr = model(), DeviceScalar(0.1, CPU)
    optimiser = SGD(network.parameters(), lr, **OPTIONS[SGD])
    optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    lr.set(0.0)
    before = copy.deepcopy(network.state_dict())
    train(network, optimiser, 1)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_without_momentum_there_is_no_state():
    network = model()
    optimiser = SGD(network.parameters(), DeviceScalar(0.1, CPU), 0.0, 0.0)
    train(network, optimiser, 1)
    assert all(not state for state in optimiser.state.values())


def test_an_overflow_in_the_first_step_leaves_the_momentum_at_zero():
    """torch's fused SGD leaves it uninitialised there."""
    network, precision = model(), Precision("fp16", CPU)
    optimiser = SGD(network.parameters(), DeviceScalar(0.1, CPU), **OPTIONS[SGD])
    before = copy.deepcopy(network.state_dict())
    loss = (network[0](torch.ones(1, 4)) * 1e38).sum()
    precision.scaler.scale(loss).backward()
    precision.step((optimiser, None))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    buffers = [state["momentum_buffer"] for state in optimiser.state.values()]
    assert all(not buffer.any() for buffer in buffers)


def test_moving_average_is_that_of_torch():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    reference = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    ).eval()
    average = MovingAverage(network, 0.9)
    assert average.state_dict().keys() == reference.state_dict().keys()
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        network(torch.randn(2, 3, 4, 4))
        average.update_parameters(network)
        reference.update_parameters(network)
        expected = reference.state_dict()
        expected["module.1.num_batches_tracked"] = network[1].num_batches_tracked
        torch.testing.assert_close(average.state_dict(), expected)


def whole(network, x):
    """A loss that every parameter takes part in."""
    for layer in network:
        x = layer(x)
    return x.square().sum()


def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, groups=5)]
    return nn.Sequential(*layers, nn.Conv2d(5, 2, 1)).to(memory_format=torch.channels_last)


def steps(network, optimiser, clip, count=3):
    inputs = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimiser.zero_grad()
        whole(network, torch.randn(2, 3, 6, 7, generator=inputs)).backward()
        clip()
        optimiser.step()


@pytest.mark.parametrize("norm", [1e-3, 1e6])
def test_one_launch_for_all_parameters_clips_and_steps_as_torch(norm, monkeypatch):
    first, second = convolutions(), convolutions()
    optimiser = ours(SGD, first)
    before = [(p.shape, p.stride()) for p in second.parameters()]
    assert [(p.shape, p.stride()) for p in first.parameters()] == before
    assert all(p.data_ptr() % 16 == 0 for p in first.parameters())
    torch_optimiser = theirs(SGD, second)
    steps(
        second,
        torch_optimiser,
        lambda: torch.nn.utils.clip_grad_norm_(second.parameters(), norm),
    )
    # Otherwise each parameter would be a part of some launch.
    monkeypatch.setattr(torch.optim.SGD, "step", None)
    steps(first, optimiser, lambda: optimiser.clip(norm))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)
    found, wanted = optimiser.state_dict()["state"], torch_optimiser.state_dict()["state"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def through_copies(network, x):
    names, parameters = zip(*network.named_parameters(), strict=True)
    made = [parameter.detach().bfloat16() for parameter in parameters]
    copies = _CastTogether.apply(made, *parameters)
    values = {name: copy.float() for name, copy in zip(names, copies, strict=True)}
    return torch.func.functional_call(network, values, x).square().sum()


def test_gradients_that_lie_in_their_places_are_not_copied(monkeypatch):
    """Of two micro-batches."""
    first, second = convolutions(), convolutions()
    optimiser, reference = ours(SGD, first), theirs(SGD, second)
    copied = []
    monkeypatch.setattr(stretch, "copy_together", lambda targets, _: copied.append(len(targets)))
    inputs = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimiser.zero_grad()
        reference.zero_grad()
        for x in torch.randn(2, 2, 3, 6, 7, generator=inputs):
            for network in (first, second):
                through_copies(network, x).backward()
        optimiser.clip(1e-3)
        torch.nn.utils.clip_grad_norm_(second.parameters(), 1e-3)
        optimiser.step()
        reference.step()
    assert not copied
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)


def test_gradients_that_lie_elsewhere_are_copied_beside_the_others():
    """Here a parameter has one that autograd made by itself."""
    first, second = convolutions(), convolutions()
    optimiser, reference = ours(SGD, first), theirs(SGD, second)
    for network, own in ((first, optimiser), (second, reference)):
        for step in range(3):
            own.zero_grad()
            loss = through_copies(network, torch.full((2, 3, 6, 7), 1.0 + step))
            (loss * 1e-3 + network[0].weight.square().sum()).backward()
            own.step()
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)


def large():
    """More than a piece, which is no multiple of them."""
    torch.manual_seed(0)
    return nn.Linear(67, 2 * optimisers.PIECE // 67)


@pytest.mark.parametrize("norm", [1e-3, 1e6])
def test_adam_clips_and_steps_in_pieces_as_torch(norm):
    first, second = large(), large()
    mine, reference = ours(Adam, first), theirs(Adam, second)
    inputs = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(5, 67, generator=inputs)
        for network, optimiser in ((first, mine), (second, reference)):
            optimiser.zero_grad()
            network(x).square().sum().backward()
        mine.clip(norm)
        torch.nn.utils.clip_grad_norm_(second.parameters(), norm)
        mine.step()
        reference.step()
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-5, atol=1e-6)
    found, wanted = mine.state_dict()["state"], reference.state_dict()["state"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_adam_without_gradients_does_nothing():
    network = model()
    optimiser = ours(Adam, network)
    before = copy.deepcopy(network.state_dict())
    optimiser.clip(1.0)
    optimiser.step()
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_a_step_of_adam_that_overflows_does_not_count():
    network, precision = large(), Precision("fp16", CPU)
    optimiser = ours(Adam, network)
    before = copy.deepcopy((network.state_dict(), optimiser.state_dict()["state"]))
    loss = (network(torch.ones(1, 67)) * 1e38).sum()
    precision.scaler.scale(loss * 1e10).backward()
    precision.step((optimiser, 1.0))
    after = (network.state_dict(), optimiser.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_copy_trains_apart_and_alike():
    network = convolutions()
    optimiser = ours(SGD, network)
    steps(network, optimiser, lambda: optimiser.clip(1.0))
    twin, twin_optimiser = copy.deepcopy((network, optimiser))
    before = copy.deepcopy(network.state_dict())
    steps(twin, twin_optimiser, lambda: twin_optimiser.clip(1.0))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    steps(network, optimiser, lambda: optimiser.clip(1.0))
    torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_weights_and_momenta_that_were_loaded_go_on():
    network, other = convolutions(), convolutions()
    optimiser, other_optimiser = ours(SGD, network), ours(SGD, other)
    steps(network, optimiser, lambda: optimiser.clip(1.0))
    other.load_state_dict(network.state_dict())
    other_optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    steps(network, optimiser, lambda: optimiser.clip(1.0))
    steps(other, other_optimiser, lambda: other_optimiser.clip(1.0))
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_parameter_without_gradient_stands_aside():
    network = model()
    optimiser = ours(SGD, network)
    before = copy.deepcopy(network[1].state_dict())
    network[0](torch.ones(5, 4)).square().sum().backward()
    optimiser.clip(1e-3)
    optimiser.step()
    torch.testing.assert_close(network[1].state_dict(), before, rtol=0, atol=0)
    norm = torch.cat([p.grad.flatten() for p in network[0].parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_clipping_meets_the_loss_scaler(name):
    network, precision = convolutions(), Precision(name, CPU)
    optimiser = SGD(network.parameters(), DeviceScalar(1.0, CPU), 0.0, 0.0)

    def moved(factor):
        before = torch.cat([p.detach().flatten() for p in network.parameters()])
        optimiser.zero_grad()
        loss = whole(network, torch.ones(2, 3, 6, 7)) * factor
        precision.scaler.scale(loss).backward()
        precision.step((optimiser, 0.5))
        return (torch.cat([p.detach().flatten() for p in network.parameters()]) - before).norm()

    assert moved(100.0).item() == pytest.approx(0.5, rel=1e-3)
    if name == "fp16":
        assert moved(1e38) == 0  # an overflow leaves the step out
        assert moved(100.0) > 0


def test_backward_takes_a_share_of_several_losses() -> None:
    w = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    precision = Precision("fp32", torch.device("cpu"))
    precision.backward(w.square().sum(), w.prod(), first=True, share=1 / 3)
    precision.backward(w.sum(), first=False)
    expected = (2 * w + w.flip(0)) / 3 + 1
    torch.testing.assert_close(w.grad, expected.detach())
