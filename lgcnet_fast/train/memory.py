"""How much memory a training step takes, from its configuration alone.

The step itself is run on tensors without data (see live_bytes.py), so whatever a network, an
operation's backend or an optimiser allocates is in the count: what is saved for the backward pass,
and temporaries where they meet the peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lgcnet_fast.config import RunConfig
from lgcnet_fast.ops.backend import suppose, use_backend
from lgcnet_fast.ops.constants import separate_constants
from lgcnet_fast.ops.lanes import LANES
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.train.finetune import Finetuner
from lgcnet_fast.train.live_bytes import LiveBytes, storage_bytes
from lgcnet_fast.train.precision import Precision
from lgcnet_fast.train.pretrain import Pretrainer
from lgcnet_fast.train.search import Searcher, SearchNetwork

WITHOUT_DATA = torch.device("cpu")
"""Where tensors without data say they are; their backends are chosen as for another device."""
CUBLAS_WORKSPACE = 2 * 2 * 2**20
"""Bytes that cuBLAS takes on a stream (see `WORKSPACE` of run.py), for the forward and for the
backward thread."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a training step, by what they are for."""

    parameters: int
    """With buffers, and the moving average where there is one."""
    optimiser: int
    batch: int
    """All micro-batches, and their copies at fixed addresses where the step is a CUDA graph."""
    gradients: int
    """Of the parameters, as far as they exist at the peak."""
    activations: int
    """What is saved for the backward pass, and temporaries."""
    workspace: int
    """An allowance for libraries; not counted."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def step_memory(
    config: RunConfig,
    stage: str,
    num_classes: int,
    precision: str,
    device: torch.device,
    genotype: Genotype | None = None,
    processes: int = 1,
) -> StepMemory:
    """Peak of one step of search, pretrain or finetune on `device`, which need not exist.

    With `config.backend = "auto"` the device must be this machine's, because its tuning table says
    which implementation runs; a named backend is counted on any machine. `precision`: fp32, bf16
    or fp16. `genotype`: of the network that is pretrained or finetuned. `processes`: among which
    the batch is shared out.
    """
    on_gpu = device.type == "cuda"
    captured = on_gpu and config.cuda_graph and processes == 1
    # Fused operations share out their work among streams where a graph is captured. With one
    # operation an edge, matrix products come to about half of them.
    of_stage = LANES if stage == "search" else LANES // 2
    streams = of_stage if captured and config.backend != "reference" else 1
    backend = use_backend(config.backend, config.strict_backend)
    with separate_constants(), suppose(device), backend, FakeTensorMode(), LiveBytes() as live:
        trainer = _trainer(config, stage, num_classes, Precision(precision, WITHOUT_DATA), genotype)
        resident = live.now
        batches = list(_batches(config, stage, processes))
        delivered = live.now - resident
        live.forget_peak()
        trainer.step(batches)
        network = trainer.network
        own = storage_bytes(*network.parameters(), *network.buffers())
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        gradient_bytes = storage_bytes(*filter(live.existed_at_peak, gradients))
    return StepMemory(
        parameters=2 * own if stage == "finetune" and config.finetune.ema is not None else own,
        optimiser=resident - own,
        batch=delivered * (2 if captured else 1),
        gradients=gradient_bytes,
        activations=live.peak - resident - delivered - gradient_bytes,
        workspace=CUBLAS_WORKSPACE * streams if on_gpu else 0,
    )


def _trainer(
    config: RunConfig,
    stage: str,
    num_classes: int,
    precision: Precision,
    genotype: Genotype | None,
) -> Any:
    space = make_space(config.space)
    if stage == "search":
        size = config.latency.size
        milliseconds = dict.fromkeys(space.lut_keys(size, num_classes), 1.0)
        latency = space.latency_model(milliseconds, size, num_classes)
        supernet = SearchNetwork(space, num_classes, latency, torch.Generator())
        return Searcher(config.search, supernet, supernet, precision, 1.0, 1)
    if stage == "pretrain":
        classifier = space.build_classifier(genotype, num_classes)
        return Pretrainer(config.pretrain, classifier, classifier, precision)
    network = space.build(genotype, num_classes)
    weights = torch.ones(num_classes) if config.finetune.class_weights != "none" else None
    # Networks without data cannot be copied for the average, so it is added afterwards.
    finetune = config.finetune.model_copy(update={"ema": None})
    return Finetuner(finetune, network, network, precision, weights)


def _batches(config: RunConfig, stage: str, processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    if stage == "pretrain":
        images, side = config.pretrain.batch_size // processes, config.pretrain.image_size
        yield _images(images, side, side), torch.zeros(images, dtype=torch.int64)
        return
    section = config.search if stage == "search" else config.finetune
    images, crop = section.batch_size // processes, section.augmentation.crop
    for _ in range(section.accumulate):
        yield _images(images, *crop), torch.zeros(images, *crop, dtype=torch.int64)


def _images(count: int, height: int, width: int) -> Tensor:
    return torch.empty(count, 3, height, width, memory_format=torch.channels_last)
