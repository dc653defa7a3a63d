"""What a worker process does for bench/trajectory.py: a search on built-in scenes, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.device import DEVICE, use_fastest_convolutions
from bench.training.case import Batch
from lgcnet_fast.config import SearchConfig
from lgcnet_fast.data.normalise import network_input
from lgcnet_fast.data.synthetic import SyntheticStreets
from lgcnet_fast.latency.build import build_table
from lgcnet_fast.latency.predict import latency_scale
from lgcnet_fast.latency.providers import RooflineProvider
from lgcnet_fast.ops.backend import set_backend
from lgcnet_fast.space.registry import make_space
from lgcnet_fast.train.capture import CapturedStep, CudaRecorder
from lgcnet_fast.train.precision import Precision, placed
from lgcnet_fast.train.search import Searcher, SearchNetwork

NUDGE = 1e-7
"""Relative: about what rounding to float32 changes."""


class TrajectoryServer:
    def __init__(self) -> None:
        use_fastest_convolutions()

    def build(
        self,
        subject: str,
        seed: int,
        space: dict[str, Any],
        batch: int,
        size: tuple[int, int],
        images: int,
    ) -> None:
        """subject: a backend, with `-graph` as one CUDA graph a step, with `-nudged` from weights
        that differ by `NUDGE`. The seed gives the weights, the noise and the order of the scenes;
        learning rates and temperature are the first."""
        backend, _, variant = subject.partition("-")
        set_backend(backend, strict=True)
        scenes = SyntheticStreets("train", images, tuple(size), seed=0)
        self._batches = shuffled(*as_tensors(scenes), batch, seed)
        searcher = make_searcher({"name": "lgcnet", **space}, scenes, seed)
        self._step: Callable[[list[Batch]], tuple[Tensor, ...]] = searcher.step
        if variant == "nudged":
            nudge(searcher.network.supernet, seed)
        if variant == "graph":
            recorder = CudaRecorder(DEVICE, [searcher.network.noise])
            self._step = CapturedStep("search", searcher.step, recorder)

    def run(self, steps: int) -> list[float]:
        """Cross entropy of each of the next steps.

        Without the latency term: that is a part of the loss in which nothing could differ.
        """
        losses = [self._step([next(self._batches)])[0][1].clone() for _ in range(steps)]
        return torch.stack(losses).tolist()


def make_searcher(options: dict[str, Any], scenes: SyntheticStreets, seed: int) -> Searcher:
    """In float32."""
    config, classes = SearchConfig(), len(scenes.classes.names)
    space = make_space(options)
    table = build_table(space, scenes.size, classes, RooflineProvider())
    latency = space.latency_model(table.milliseconds, scenes.size, classes)
    torch.manual_seed(seed)
    noise = torch.Generator(DEVICE).manual_seed(seed)
    scale = latency_scale(space, latency)
    network = placed(SearchNetwork(space, classes, latency, noise).train(), DEVICE)
    precision = Precision("fp32", DEVICE)
    searcher = Searcher(config, network, network, precision, scale, total_steps=1)
    searcher.set_epoch(0)
    return searcher


@torch.no_grad()
def nudge(network: nn.Module, seed: int) -> None:
    """Changes every weight by a random part of itself, of the deviation `NUDGE`."""
    noise = torch.Generator(DEVICE).manual_seed(seed)
    for weight in network.parameters():
        weight.mul_(1 + NUDGE * torch.randn(weight.shape, generator=noise, device=DEVICE))


def as_tensors(scenes: SyntheticStreets) -> Batch:
    """All images, normalised, and their labels, on the device."""
    images = torch.stack([torch.from_numpy(scenes.image(i)) for i in range(len(scenes))])
    labels = torch.stack([torch.from_numpy(scenes.label(i)) for i in range(len(scenes))])
    return network_input(images.to(DEVICE), None), labels.to(DEVICE).long()


def shuffled(images: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[Batch]:
    """Batches without end; every scene once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(images) // batch * batch].view(-1, batch).to(DEVICE):
            picked = images[chosen].contiguous(memory_format=torch.channels_last)
            yield picked, labels[chosen]
