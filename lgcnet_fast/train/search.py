"""The search (LGCNet section 5): network weights and architecture from one loss, one backward.

Each forward pass draws one Z, shared by the cross entropy and the latency term; then SGD steps
the weights and Adam the architecture parameters with those of the graph-guided modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lgcnet_fast.config import SearchConfig
from lgcnet_fast.data.loader import Batch
from lgcnet_fast.nn.together import Part, together
from lgcnet_fast.ops import upsample_cross_entropy
from lgcnet_fast.ops.lanes import in_background
from lgcnet_fast.space.base import Arch, LatencyModel, LatencyTerms, SearchSpace
from lgcnet_fast.space.sampling import gumbel_softmax, probabilities
from lgcnet_fast.train.capture import Step, captured
from lgcnet_fast.train.checkpoint import Stateful, load_checkpoint, save_checkpoint
from lgcnet_fast.train.controller import LatencyController
from lgcnet_fast.train.distributed import parallel
from lgcnet_fast.train.finite import require_finite, require_finite_parameters
from lgcnet_fast.train.losses import latency_loss, strength
from lgcnet_fast.train.metrics import Confusion, MetricsLog
from lgcnet_fast.train.monitor import inspect
from lgcnet_fast.train.optimisers import SGD, Adam
from lgcnet_fast.train.precision import Precision, placed
from lgcnet_fast.train.prediction import LatencyPredictor, latency_predictor
from lgcnet_fast.train.progress import StageProgress
from lgcnet_fast.train.run import Run
from lgcnet_fast.train.schedules import DeviceScalar, cosine, temperature
from lgcnet_fast.train.sources import optimiser_steps, train_loader

STAGE = "search"
LOG_EVERY = 20
"""Optimiser steps between two log lines: fetching a loss waits for the device."""
WHEN_NOT_FINITE = "lower search.weight_lr, or use precision = bf16 or fp32"


class SearchOutput(NamedTuple):
    logits: Tensor
    """(N, classes, h, w) at the output stride."""
    z: Arch
    """Of this forward pass: group -> (rows, options)."""


class SearchNetwork(nn.Module):
    """Supernet, architecture parameters and latency model behind one forward pass."""

    def __init__(
        self,
        space: SearchSpace,
        num_classes: int,
        latency: LatencyModel,
        noise: torch.Generator,
    ) -> None:
        super().__init__()
        self.supernet = space.build_supernet(num_classes)
        self.arch = space.build_arch()
        self.latency = latency
        self.groups = space.arch_groups()
        self.num_classes = num_classes
        self.noise = noise

    def forward(self, images: Tensor, temperature: Tensor) -> SearchOutput:
        """images: (N, 3, H, W); temperature: a scalar."""
        names: list[str] = []

        def choices(temperature: Tensor) -> list[Tensor]:
            # Small matrices, where half precision would cost accuracy and save nothing.
            with torch.autocast(images.device.type, enabled=False):
                z = gumbel_softmax(self.arch(), temperature, self.noise, self.groups)
            names[:] = z
            return list(z.values())

        def z_of(results: Sequence[Tensor]) -> Arch:
            return dict(zip(names, results, strict=True))

        part = Part(choices, [temperature], [self.arch])
        logits, results = self.supernet.beside(images, part, z_of)
        return SearchOutput(logits, z_of(results))


class Searcher:
    """Everything that one optimiser step of the search needs."""

    def __init__(
        self,
        config: SearchConfig,
        network: SearchNetwork,
        wrapped: nn.Module,
        precision: Precision,
        scale: float,
        total_steps: int,
    ) -> None:
        self.config, self.network, self.wrapped = config, network, wrapped
        self.precision, self.scale = precision, scale
        device = precision.device
        self.weight_lr = DeviceScalar(config.weight_lr, device)
        self.temperature = DeviceScalar(config.temperature_start, device)
        self.weight_optimiser = SGD(
            network.supernet.parameters(), self.weight_lr, config.momentum, config.weight_decay
        )
        self.arch_optimiser = Adam(
            network.arch.parameters(), config.arch_lr, config.arch_betas, config.arch_weight_decay
        )
        self.controller = None
        if config.latency_target_ms is not None:
            self.controller = LatencyController(config.latency_target_ms, total_steps, device)

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds, by name."""
        parts: dict[str, Stateful] = {
            "model": self.network.supernet,
            "arch": self.network.arch,
            "weight_optimiser": self.weight_optimiser,
            "arch_optimiser": self.arch_optimiser,
            "scaler": self.precision.scaler,
        }
        return parts if self.controller is None else {**parts, "controller": self.controller}

    def set_epoch(self, epoch: int) -> None:
        config = self.config
        lr = cosine(epoch, config.epochs, config.weight_lr, config.weight_lr_min)
        self.weight_lr.set(lr)
        first, last = config.temperature_start, config.temperature_end
        self.temperature.set(temperature(epoch, config.epochs, first, last))

    def step(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """One optimiser step on `config.accumulate` micro-batches.

        Returns, on the device: (4,) loss, cross entropy, weighted latency loss and milliseconds
        under the sampled Z, averaged over the micro-batches; then logits and labels of the last.
        """
        self.weight_optimiser.zero_grad()
        self.arch_optimiser.zero_grad()
        beta = self._beta()
        sums = torch.zeros(4, device=self.precision.device)
        for number, (images, labels) in enumerate(batches):
            with self.precision.autocast():
                output = self.wrapped(images, self.temperature.tensor)
            cross_entropy, latency, milliseconds = self._losses(output, labels, beta)
            share = 1 / self.config.accumulate
            self.precision.backward(cross_entropy, latency, first=number == 0, share=share)
            terms = [term.detach() for term in (cross_entropy, latency, milliseconds)]
            in_background(sums.device, partial(_add_terms, sums, terms, share))
        self.precision.step(
            (self.weight_optimiser, self.config.weight_clip),
            (self.arch_optimiser, self.config.arch_clip),
        )
        return sums, output.logits.detach(), labels

    def _losses(
        self, output: SearchOutput, labels: Tensor, beta: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy; beside it the weighted latency loss, and the latency in milliseconds."""

        def of_logits(logits: Tensor) -> list[Tensor]:
            return [upsample_cross_entropy(logits, labels)]

        def of_latency(*z: Tensor) -> list[Tensor]:
            terms = self.network.latency(dict(zip(output.z, z, strict=True)))
            loss = beta * latency_loss(terms, self.config.latency_loss, self.scale)
            return [loss, terms.total]

        parts = [Part(of_logits, [output.logits]), Part(of_latency, [*output.z.values()])]
        (cross_entropy,), (weighted, milliseconds) = together(parts)
        return cross_entropy, weighted, milliseconds

    @torch.no_grad()
    def expected_latency(self, temperature: float | Tensor = 1.0) -> LatencyTerms:
        """Under softmax(alpha' / temperature), in milliseconds, on the device."""
        network = self.network
        return network.latency(probabilities(network.arch(), network.groups, temperature))

    def _beta(self) -> float | Tensor:
        if self.controller is None:
            return self.config.beta
        terms = self.expected_latency(self.temperature.tensor)
        return self.controller.multiplier(terms.total) / strength(terms, self.config.latency_loss)


def _add_terms(sums: Tensor, terms: Sequence[Tensor], share: float) -> None:
    """sums: (4,), the loss first; terms: cross entropy, weighted latency loss, milliseconds."""
    cross_entropy, latency, milliseconds = (term.float() for term in terms)
    found = torch.stack([cross_entropy + latency, cross_entropy, latency, milliseconds])
    sums.add_(found, alpha=share)


def search(run: Run) -> dict[str, object]:
    """Runs or continues the stage; returns its headline numbers.

    With the strategy `random`, or with a given genotype, there is nothing to train.
    """
    config = run.config.search
    if run.config.genotype is not None:
        return run.finish(STAGE, {"skipped": f"genotype {run.config.genotype} is given"})
    predictor = latency_predictor(run)
    if config.strategy == "random":
        return run.finish(STAGE, {"skipped": "the random strategy draws without training"})
    return _train(run, predictor)


def _train(run: Run, predictor: LatencyPredictor) -> dict[str, object]:
    config, ranks = run.config.search, run.ranks
    per_rank = ranks.share(config.batch_size, "search.batch_size")
    loader = train_loader(run, run.config.data.train_splits, config.augmentation, per_rank)
    steps = optimiser_steps(len(loader), config.accumulate, "search.accumulate")
    searcher = _searcher(run, predictor, steps * config.epochs)
    network = searcher.network
    path, generators = run.checkpoint_path(STAGE), {"noise": network.noise}
    first = 0
    if path.exists():
        first = load_checkpoint(path, STAGE, searcher.parts(), generators)
    log = MetricsLog(run.stage_folder(STAGE), first, enabled=ranks.first)
    step = captured(run, STAGE, searcher.step, [network.noise])
    network.train()
    with StageProgress(STAGE, steps * config.epochs, first * steps, ranks.first) as progress:
        for epoch in range(first, config.epochs):
            loader.set_epoch(epoch)
            searcher.set_epoch(epoch)
            _train_epoch(searcher, step, iter(loader), epoch, steps, log, progress)
            require_finite_parameters(network, STAGE, epoch, WHEN_NOT_FINITE)
            state = _inspect(run, network, predictor)
            log.write(epoch, (epoch + 1) * steps, **state)
            log.flush()
            if ranks.first:
                save_checkpoint(path, STAGE, epoch + 1, searcher.parts(), generators)
    log.close()
    return run.finish(STAGE, {"epochs": config.epochs, **_inspect(run, network, predictor)})


def _searcher(run: Run, predictor: LatencyPredictor, total_steps: int) -> Searcher:
    config, ranks, device = run.config.search, run.ranks, run.device
    torch.manual_seed(run.seed)
    noise = _noise(run.seed, ranks.rank, device)
    network = SearchNetwork(run.space, run.num_classes, predictor.trained_with(), noise)
    network = placed(network, device)
    # Fewer than 4 images a device leave too little for batch statistics.
    sync_bn = config.batch_size < 4 * ranks.world
    wrapped = parallel(network, ranks, device, sync_bn)
    precision = Precision(run.precision, device)
    return Searcher(config, network, wrapped, precision, predictor.scale, total_steps)


def _noise(seed: int, rank: int, device: torch.device) -> torch.Generator:
    """The Gumbel noise of a rank: a stream apart from the others', from the weights' and data's."""
    state = np.random.SeedSequence((seed, rank, 0, 1)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def _inspect(run: Run, network: SearchNetwork, predictor: LatencyPredictor) -> dict[str, float]:
    """The collapse monitor, and the latency of the genotype that `derive` would choose now."""
    with torch.no_grad():
        alpha = {name: logits.cpu().float() for name, logits in network.arch().items()}
    genotype, _ = run.space.discretise(alpha)
    return {
        **inspect(alpha, network.groups, predictor.model),
        "argmax_ms": predictor.milliseconds(genotype),
    }


def _train_epoch(
    searcher: Searcher,
    train: Step[tuple[Tensor, Tensor, Tensor]],
    batches: Iterator[Batch],
    epoch: int,
    steps: int,
    log: MetricsLog,
    progress: StageProgress,
) -> None:
    config, device = searcher.config, searcher.precision.device
    confusion = Confusion(searcher.network.num_classes, device)
    sums, counted = torch.zeros(4, device=device), 0
    for step in range(epoch * steps, (epoch + 1) * steps):
        terms, logits, labels = train(islice(batches, config.accumulate))
        sums, counted = sums + terms, counted + 1
        last = step + 1 == (epoch + 1) * steps
        if not last and (step + 1) % LOG_EVERY:
            continue
        # The training batches stand in for val: a supernet's score under soft Z, weights shared
        # by all candidates and BN without affine, ranks nothing and would cost a pass over val.
        stride = searcher.network.supernet.output_stride
        confusion.add(logits.argmax(1), labels[:, ::stride, ::stride])
        loss, cross_entropy, latency, sampled_ms = (sums / counted).tolist()
        require_finite(loss, STAGE, epoch, step, WHEN_NOT_FINITE)
        values = {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "latency_loss": latency,
            "sampled_ms": sampled_ms,
            "expected_ms": float(searcher.expected_latency().total),
            "train_miou": confusion.miou(),
            "temperature": searcher.temperature.value,
        }
        if searcher.controller is not None:
            values["multiplier"] = float(searcher.controller.last)
        log.write(epoch, step + 1, **values, lr=searcher.weight_lr.value)
        progress.show(step + 1, f"{epoch + 1}/{config.epochs}", **values)
        sums, counted = torch.zeros_like(sums), 0
