"""What a worker process does for bench/deploy.py: our engine beside one stock subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.device import CUDA, DEVICE, release_memory
from bench.genotypes import genotype_named
from bench.rounds import median, ratios, tenth_percentile
from bench.stock.networks import plain
from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.engines import network_blueprint
from lgcnet_fast.benchmark.networks import random_network, settle_batch_norms
from lgcnet_fast.benchmark.plain import Pipeline, exact_float32, plain_frame
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.latency.timing import Protocol, Timing, time_interleaved
from lgcnet_fast.space.base import SegmentationNetwork

CLASSES = 19
RUNTIMES = {"eager": "eager", "graph": "graph", "autotuned": "compile+graph"}
"""autotuned: torch.compile(max-autotune), then a CUDA graph."""
PROTOCOL = Protocol(rounds=10, warm_up_seconds=0.5, block_seconds=0.15, single_frames=30)
BRIEF = Protocol(rounds=2, warm_up_seconds=0, warm_up_frames=1, block_seconds=0, single_frames=1)
MARGIN = 1e-3
"""Between the two best logits: where it is smaller, float32 may choose either class."""
SLACK = 1e-3
"""Share of pixels on which half precision may always differ."""


class DeployServer:
    def __init__(self, protocol: Protocol = PROTOCOL if CUDA else BRIEF) -> None:
        self._protocol = protocol
        self._frames: dict[str, Callable[[], Tensor]] = {}
        self._batch = 1

    def build(
        self, case: dict[str, Any], genotype: str, space: dict[str, Any], ours: str, stock: str
    ) -> None:
        """Makes the frames that `times` and `compare` time: ours and those of plain PyTorch."""
        given = _case(case)
        network = _network(genotype, space)
        kind, _, layout = stock.partition("-")
        with exact_float32():
            self._frames = {
                "ours": _engine(network, genotype, space, given, ours),
                stock: plain_frame(plain(network), given, DEVICE, RUNTIMES[kind], layout),
            }
        self._batch = given.batch

    def compare(self) -> dict[str, Any]:
        """Numbers of frames of both, which take turns, and ends both."""
        mine, theirs = self.times().values()
        self._frames = {}
        release_memory()
        rounds = ratios(mine.round_fps, theirs.round_fps)
        return {
            **_told(theirs),
            **{f"ours_{name}": value for name, value in _told(mine).items()},
            "speed_up": median(rounds),
            "speed_up_p10": tenth_percentile(rounds),
        }

    def times(self) -> dict[str, Timing]:
        """Of what `build` made: `ours`, then the stock."""
        with exact_float32():
            return time_interleaved(self._frames, DEVICE, self._batch, self._protocol)

    def check(
        self, case: dict[str, Any], genotype: str, space: dict[str, Any], ours: str
    ) -> dict[str, Any]:
        """Share of pixels whose label differs from plain float32, and what is wrong with it."""
        given = _case({**case, "batch": 1})
        network = _network(genotype, space)
        images = given.images(DEVICE)
        with exact_float32(), torch.inference_mode():
            found = _engine(network, genotype, space, given, ours)()
            exact = Pipeline(plain(network).to(DEVICE), torch.float32, "nchw", upsample=False)
            labels, certain = labels_and_certainty(exact.to(DEVICE)(images), given.size)
            differs = found.reshape(labels.shape) != labels
            wrong = differs.float().mean().item()
            result = {"differs": wrong, "differs_where_certain": int((differs & certain).sum())}
            if given.dtype == "fp32":
                faults = result["differs_where_certain"] > 0
            else:
                half = plain_frame(network.float(), given, DEVICE, "eager", "nchw")()
                result["stock_differs"] = (half != labels).float().mean().item()
                faults = not wrong <= 2 * result["stock_differs"] + SLACK
        release_memory()
        return {**result, "right": not faults}


def _case(values: dict[str, Any]) -> Case:
    return Case(**{**values, "size": tuple(values["size"])})


def _network(genotype: str, space: dict[str, Any]) -> SegmentationNetwork:
    network = random_network(genotype_named(genotype, space), CLASSES)
    settle_batch_norms(network)
    return network


def _engine(
    network: SegmentationNetwork, genotype: str, space: dict[str, Any], case: Case, backend: str
) -> Callable[[], Tensor]:
    chosen = genotype_named(genotype, space)
    blueprint = network_blueprint(network, chosen, CLASSES, case.size)
    engine = Engine(blueprint, DEVICE, case.dtype, backend)
    images = case.images(DEVICE)
    return lambda: engine.batch_labels(images)


def labels_and_certainty(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(N, classes, h, w) to uint8 labels (N, *size), and where the two best differ by `MARGIN`."""
    full = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)
    best = full.topk(2, dim=1)
    return best.indices[:, 0].to(torch.uint8), best.values[:, 0] - best.values[:, 1] > MARGIN


def _told(timing: Timing) -> dict[str, Any]:
    told = asdict(timing)
    del told["round_fps"]
    return told
