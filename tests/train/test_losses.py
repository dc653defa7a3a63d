"""Latency losses, schedules, controller and precision on their own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lgcnet_fast.latency.predict import PAPER_MEAN_MS
from lgcnet_fast.space.base import LatencyTerms
from lgcnet_fast.space.sampling import probabilities
from lgcnet_fast.train.controller import LIMIT, PROPORTIONAL, LatencyController
from lgcnet_fast.train.losses import latency_loss, strength
from lgcnet_fast.train.optimisers import SGD
from lgcnet_fast.train.precision import Precision, resolve_precision
from lgcnet_fast.train.schedules import DeviceScalar, cosine, exponential, poly, temperature, warmup
from tests.train.toy import MILLISECONDS, ToyLatency

FORMS = ("linear_ms", "log_total", "log_cell", "log_edge")


def _terms(edges: torch.Tensor) -> LatencyTerms:
    return LatencyTerms(2.0, edges.view(2, -1).sum(1), edges)


@pytest.mark.parametrize("form", FORMS)
def test_form_matches_its_definition_and_its_gradient(form):
    edges = torch.tensor([0.5, 1.5, 0.25, 0.75], dtype=torch.float64, requires_grad=True)

    def loss(edges):
        return latency_loss(_terms(edges), form, 2.0)

    def log_us(ms):
        return math.log(1 + 1000 * ms)

    expected = {
        "linear_ms": 6.0,
        "log_total": log_us(10.0),
        "log_cell": log_us(4.0) + log_us(2.0),
        "log_edge": log_us(1.0) + log_us(3.0) + log_us(0.5) + log_us(1.5),
    }
    assert loss(edges).item() == pytest.approx(expected[form])
    assert torch.autograd.gradcheck(loss, edges)


@pytest.mark.parametrize("form", FORMS)
def test_strength_is_the_change_per_e_fold(form):
    edges = torch.full((4,), PAPER_MEAN_MS / 4, dtype=torch.float64)

    def at(factor):
        return latency_loss(
            LatencyTerms(0.0, (factor * edges).view(2, 2).sum(1), factor * edges), form, 1.0
        )

    step = 1e-4
    slope = (at(math.exp(step)) - at(math.exp(-step))) / (2 * step)
    assert strength(_terms(edges), form) == pytest.approx(slope.item(), rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_free_network_has_finite_loss_and_gradient(form):
    edges = torch.zeros(4, requires_grad=True)
    loss = latency_loss(LatencyTerms(0.0, edges.view(2, 2).sum(1), edges), form, 1.0)
    loss.backward()
    assert loss.item() == 0
    assert edges.grad.isfinite().all()


def test_schedules_at_their_ends():
    assert temperature(0, 150, 1.0, 0.03) == 1.0
    assert temperature(149, 150, 1.0, 0.03) == pytest.approx(0.03)
    assert temperature(0, 1, 1.0, 0.03) == 1.0
    assert cosine(0, 10, 0.025, 0.001) == pytest.approx(0.025)
    assert cosine(10, 10, 0.025, 0.001) == pytest.approx(0.001)
    assert poly(0, 10, 0.01, 0.9) == 0.01
    assert poly(10, 10, 0.01, 0.9) == 0
    assert exponential(2, 0.1, 0.97) == pytest.approx(0.1 * 0.97**2)
    assert [warmup(epoch, 4) for epoch in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup(0, 0) == 1


@pytest.mark.parametrize("target", [4.0, 9.0, 16.0])
def test_controller_leads_the_argmax_to_the_target(target):
    """Logits that a task pulls towards the dear option settle near the target."""
    latencies, _ = _controlled(target)
    assert latencies[-1] == pytest.approx(target, abs=max(MILLISECONDS))


def test_multiplier_does_not_jump_where_the_argmax_does():
    latencies, multipliers = _controlled(9.0)
    jumps = [abs(math.log(b / a)) for a, b in pairwise(latencies)]
    changes = [abs(b - a) for a, b in pairwise(multipliers)]
    assert max(changes) < max(jumps) / 5
    reversals = sum(a * b < 0 for a, b in pairwise(multipliers))
    assert reversals < 10


def _controlled(target: float) -> tuple[list[float], list[float]]:
    """Argmax latency and multiplier at each of 1,500 steps of a search with a target."""
    torch.manual_seed(0)
    logits = nn.Parameter(0.01 * torch.randn(6, len(MILLISECONDS)))
    # Rows differ in what the dear option is worth to them.
    worth = torch.outer(torch.linspace(0.01, 0.1, 6), torch.tensor(MILLISECONDS))
    optimiser = torch.optim.Adam([logits], lr=0.02)
    model, steps = ToyLatency(), 1500
    controller = LatencyController(target, steps, torch.device("cpu"))
    latencies, multipliers = [], []
    for step in range(steps):
        optimiser.zero_grad()
        now = temperature(step, steps, 1.0, 0.03)
        with torch.no_grad():
            multiplier = controller.multiplier(
                model(probabilities({"rows": logits}, temperature=now)).total
            )
        soft = {"rows": logits.softmax(-1)}
        loss = multiplier * model(soft).total / PAPER_MEAN_MS - (soft["rows"] * worth).sum()
        loss.backward()
        optimiser.step()
        picks = nn.functional.one_hot(logits.argmax(-1), len(MILLISECONDS)).float()
        latencies.append(model({"rows": picks}).total.item())
        multipliers.append(multiplier.item())
    return latencies, multipliers


def test_multiplier_stays_below_the_cross_entropy_when_the_target_is_out_of_reach():
    controller = LatencyController(1.0, 100, torch.device("cpu"))
    multipliers = [controller.multiplier(torch.tensor(20.0)).item() for _ in range(100)]
    assert max(multipliers) == pytest.approx(PROPORTIONAL * 2 + LIMIT)


def test_controller_state_travels():
    first = LatencyController(5.0, 10, torch.device("cpu"))
    first.multiplier(torch.tensor(10.0))
    second = LatencyController(5.0, 10, torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    now = torch.tensor(7.0)
    assert torch.equal(first.multiplier(now), second.multiplier(now))


def test_precision_resolves_to_what_the_cpu_has():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_step_clips_and_survives_an_overflow(name):
    precision = Precision(name, torch.device("cpu"))
    model = nn.Linear(4, 4)
    device = precision.device
    optimiser = SGD(model.parameters(), DeviceScalar(1.0, device), 0.0, 0.0)

    def step(factor):
        optimiser.zero_grad()
        with precision.autocast():
            output = model(torch.ones(2, 4))
        precision.scaler.scale((output.float() * factor).sum()).backward()
        before = model.weight.detach().clone()
        precision.step((optimiser, 0.5))
        return (model.weight.detach() - before).norm().item()

    assert 0 < step(0.2) <= 0.5 + 1e-3
    if name == "fp16":
        assert step(1e38) == 0  # scaled gradients overflow: skipped, and the scale shrinks
        assert precision.scaler.get_scale() < 65536
