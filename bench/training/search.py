"""The search step: noise, graph-guided module, supernet, loss with latency term, SGD and Adam."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bench.device import DEVICE
from bench.stock.losses import resized_cross_entropy
from bench.stock.networks import compile_cells, plain
from bench.training.case import CLASSES, Batch, Step, TrainingCase, as_graph, autocast
from bench.training.gradients import Gradients
from lgcnet_fast.config import SearchConfig
from lgcnet_fast.latency.build import build_table
from lgcnet_fast.latency.providers import RooflineProvider
from lgcnet_fast.ops import upsample_cross_entropy
from lgcnet_fast.ops.backend import set_backend, use_backend
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.train.losses import latency_loss
from lgcnet_fast.train.precision import Precision, placed
from lgcnet_fast.train.search import Searcher, SearchNetwork

CONFIG = SearchConfig()


def make_step(subject: str, case: TrainingCase) -> Step:
    kind, _, choice = subject.partition("-")
    return _our_step(choice, case) if kind == "ours" else _stock_step(kind, choice, case)


def _network(case: TrainingCase) -> SearchNetwork:
    """The same weights and noise every time, in training mode."""
    torch.manual_seed(0)
    space = make_space({"name": "lgcnet", **case.space})
    table = build_table(space, case.size, CLASSES, RooflineProvider())
    latency = space.latency_model(table.milliseconds, case.size, CLASSES)
    noise = torch.Generator(DEVICE).manual_seed(1)
    return SearchNetwork(space, CLASSES, latency, noise).train()


def _our_step(backend: str, case: TrainingCase) -> Step:
    set_backend(backend, strict=True)
    network = placed(_network(case), DEVICE)
    precision = Precision(case.precision, DEVICE)
    searcher = Searcher(CONFIG, network, network, precision, scale=1.0, total_steps=1000)
    searcher.set_epoch(0)
    step = as_graph("search", searcher.step, case.data(), (network.noise,))
    return lambda: step()[0][0]


def _stock_step(kind: str, layout: str, case: TrainingCase) -> Step:
    network = _network(case).to(DEVICE)
    plain(network.supernet)
    images, labels = case.data()
    if layout == "nhwc":
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    loss_of = resized_cross_entropy
    if kind == "compiled":
        compile_cells(network.supernet)
        loss_of = torch.compile(loss_of, dynamic=False) if DEVICE.type == "cuda" else loss_of
    weights = list(network.supernet.parameters())
    arch = list(network.arch.parameters())
    fused = {"fused": True}
    sgd = torch.optim.SGD(
        weights, CONFIG.weight_lr, CONFIG.momentum, weight_decay=CONFIG.weight_decay, **fused
    )
    adam = torch.optim.Adam(
        arch,
        CONFIG.arch_lr,
        CONFIG.arch_betas,
        weight_decay=CONFIG.arch_weight_decay,
        capturable=DEVICE.type == "cuda",
        **fused,
    )
    temperature = torch.ones((), device=DEVICE)

    def step(batches: Iterable[Batch]) -> Tensor:
        sgd.zero_grad()
        adam.zero_grad()
        for x, y in batches:
            with autocast(case.precision):
                output = network(x, temperature)
            loss = loss_of(output.logits, y)
            latency = network.latency(output.z)
            loss = loss + CONFIG.beta * latency_loss(latency, CONFIG.latency_loss, 1.0)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CONFIG.weight_clip)
        torch.nn.utils.clip_grad_norm_(arch, CONFIG.arch_clip)
        sgd.step()
        adam.step()
        return loss.detach()

    if kind == "eager":
        return lambda: step([(images, labels)])
    return as_graph("stock", step, (images, labels), (network.noise,))


def gradients(subject: str, case: TrainingCase) -> Gradients:
    """Loss and gradients of one step under the same noise; `truth`: plain float64."""
    kind, _, backend = subject.partition("-")
    network = placed(_network(case), DEVICE)
    if kind != "ours":
        plain(network.supernet)
    images, labels = case.data()
    if kind == "truth":
        network.supernet.double()
        images = images.double()
    temperature = torch.ones((), device=DEVICE)
    with use_backend(backend if kind == "ours" else "reference", strict=True):
        with autocast("fp32" if kind == "truth" else case.precision):
            output = network(images, temperature)
        loss = (upsample_cross_entropy if kind == "ours" else resized_cross_entropy)(
            output.logits, labels
        )
        loss.backward()
    return Gradients.of(
        loss, weights=network.supernet.parameters(), architecture=network.arch.parameters()
    )
