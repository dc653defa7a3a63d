"""The finetune step of a derived network: forward, loss, backward, SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bench.device import DEVICE
from bench.genotypes import genotype_named
from bench.stock.losses import hardest_pixels_loss, resized_cross_entropy
from bench.stock.networks import compile_cells, plain
from bench.training.case import CLASSES, Batch, Step, TrainingCase, as_graph, autocast
from bench.training.gradients import Gradients
from lgcnet_fast.config import FinetuneConfig
from lgcnet_fast.ops import upsample_cross_entropy
from lgcnet_fast.ops.backend import set_backend, use_backend
from lgcnet_fast.space.base import SegmentationNetwork
from lgcnet_fast.space.lgcnet import LGCNet
from lgcnet_fast.train.finetune import Finetuner
from lgcnet_fast.train.precision import Precision, placed


def make_step(subject: str, case: TrainingCase) -> Step:
    kind, _, choice = subject.partition("-")
    return _our_step(choice, case) if kind == "ours" else _stock_step(kind, choice, case)


def _network(case: TrainingCase) -> SegmentationNetwork:
    torch.manual_seed(0)
    return LGCNet.build(genotype_named(case.genotype, case.space), CLASSES).train()


def _config(case: TrainingCase) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"loss": case.loss})


def _our_step(backend: str, case: TrainingCase) -> Step:
    set_backend(backend, strict=True)
    network = placed(_network(case), DEVICE)
    trainer = Finetuner(
        _config(case), network, network, Precision(case.precision, DEVICE), class_weights=None
    )
    return as_graph("finetune", trainer.step, case.data(), ())


def _stock_loss(case: TrainingCase) -> Callable[[Tensor, Tensor], Tensor]:
    config = _config(case)
    if config.loss == "cross_entropy":
        return resized_cross_entropy
    return lambda logits, labels: hardest_pixels_loss(
        logits, labels, config.ohem_threshold, config.ohem_keep
    )


def _stock_step(kind: str, layout: str, case: TrainingCase) -> Step:
    config = _config(case)
    network = plain(_network(case).to(DEVICE))
    images, labels = case.data()
    if layout == "nhwc":
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    loss_of = _stock_loss(case)
    if kind == "compiled":
        compile_cells(network)
        loss_of = torch.compile(loss_of, dynamic=False) if DEVICE.type == "cuda" else loss_of
    sgd = torch.optim.SGD(
        network.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )

    def step(batches: Iterable[Batch]) -> Tensor:
        sgd.zero_grad()
        for x, y in batches:
            with autocast(case.precision):
                logits = network(x)
            loss = loss_of(logits, y)
            loss.backward()
        sgd.step()
        return loss.detach()

    if kind == "eager":
        return lambda: step([(images, labels)])
    return as_graph("stock", step, (images, labels), ())


def gradients(subject: str, case: TrainingCase) -> Gradients:
    """Loss and gradients of one step; `truth`: plain float64.

    With the plain cross entropy: which pixels are the hardest is for rounding to decide.
    """
    kind, _, backend = subject.partition("-")
    network = placed(_network(case), DEVICE)
    if kind != "ours":
        plain(network)
    images, labels = case.data()
    if kind == "truth":
        network.double()
        images = images.double()
    with use_backend(backend if kind == "ours" else "reference", strict=True):
        with autocast("fp32" if kind == "truth" else case.precision):
            logits = network(images)
        loss = (upsample_cross_entropy if kind == "ours" else resized_cross_entropy)(logits, labels)
        loss.backward()
    return Gradients.of(loss, weights=network.parameters())
