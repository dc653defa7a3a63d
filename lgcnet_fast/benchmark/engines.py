"""Frames of deployed engines, and the timers that latency tables are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.networks import random_network
from lgcnet_fast.benchmark.plain import TensorFrame, with_copies
from lgcnet_fast.config import Size
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.deploy.blueprint import Blueprint
from lgcnet_fast.deploy.engine import Engine, ReferenceEngine
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.deploy.replay import GraphEngine
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.latency.networks import FrameTimer, Progress
from lgcnet_fast.latency.providers import measured_on
from lgcnet_fast.latency.timing import Frame
from lgcnet_fast.ops import use_backend
from lgcnet_fast.ops.compile_ahead import can_take_notes, compile_all, one_after_another
from lgcnet_fast.parallel import Enough, in_processes
from lgcnet_fast.space.base import SegmentationNetwork
from lgcnet_fast.space.genotype import Genotype, parse_genotype


def unnamed_classes(count: int) -> ClassSet:
    """Names and colours for a network that has none."""
    names = tuple(f"class {number}" for number in range(count))
    return ClassSet("random", names, np.zeros((count, 3), np.uint8), output_ids=tuple(range(count)))


def network_blueprint(
    network: SegmentationNetwork, genotype: Genotype, num_classes: int, size: Size
) -> Blueprint:
    return Blueprint(genotype, unnamed_classes(num_classes), size, fold(network))


def engine_frame(
    blueprint: Blueprint, case: Case, device: torch.device, backend: str = "auto"
) -> TensorFrame:
    """A frame of a deployed engine: uint8 images on the device to uint8 labels at their size.

    Raises `ConfigError` for a case that engines do not serve, `BackendError` where a named backend
    cannot serve.
    """
    if not case.upsample:
        raise ConfigError("engines end with the label map; leave the logits to plain networks")
    case.check_device(device)
    engine = Engine(blueprint, device, case.dtype, backend)
    images = case.images(device)
    return with_copies(lambda: engine.batch_labels(images), images, case)


@dataclass(frozen=True)
class EngineRecipe:
    """How engines of genotypes are made; can be sent to other processes."""

    case: Case
    num_classes: int
    device: torch.device
    backend: str

    def frame(self, genotype: Genotype) -> Frame:
        return engine_frame(self._blueprint(genotype), self.case, self.device, self.backend)

    def compiles(self, genotype: Genotype) -> bool:
        """Whether an engine needs kernels of its own, which take longer than anything else."""
        return not isinstance(self._engine(genotype).runner, ReferenceEngine)

    def rehearse(self, genotype: Genotype) -> None:
        """Starts the kernels of an engine that compiles some, without recording them."""
        runner = self._engine(genotype).runner
        assert isinstance(runner, GraphEngine)
        runner.rehearse(self.case.batch, self.case.size)

    def run_once(self, genotype: str) -> None:
        """Of a genotype's JSON: compiles its kernels into the cache that all processes share."""
        with one_after_another():
            self.frame(parse_genotype(genotype.encode(), "genotype"))()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _blueprint(self, genotype: Genotype) -> Blueprint:
        network = random_network(genotype, self.num_classes)
        return network_blueprint(network, genotype, self.num_classes, self.case.size)

    def _engine(self, genotype: Genotype) -> Engine:
        return Engine(self._blueprint(genotype), self.device, self.case.dtype, self.backend)


def engine_timer(
    size: Size,
    num_classes: int,
    device: torch.device,
    dtype: str,
    batch: int = 1,
    backend: str = "auto",
) -> FrameTimer:
    """Times the engines of genotypes, from image to label map, both on the device.

    Kernels of many genotypes are compiled beforehand, equal ones once, by as many processes as
    there are cores.
    """
    recipe = EngineRecipe(Case(size, batch, dtype), num_classes, device, backend)

    def prepare(genotypes: Sequence[Genotype], progress: Progress, enough: Enough) -> int:
        if not genotypes or not recipe.compiles(genotypes[0]):
            return len(genotypes)
        if can_take_notes():
            return compile_all(recipe.rehearse, genotypes, progress, enough)
        texts = [genotype.model_dump_json() for genotype in genotypes]
        return in_processes(recipe.run_once, texts, progress, enough)

    made_on = measured_on(device, "fitted", "deploy", recipe.case.torch_dtype, batch, backend)
    return FrameTimer(recipe.frame, device, made_on, prepare)


def plain_timer(
    size: Size, num_classes: int, device: torch.device, dtype: str, batch: int = 1
) -> FrameTimer:
    """Times plain networks op by op, from normalised image to logits: what eager tables predict."""
    case = Case(size, batch, dtype)

    def build(genotype: Genotype) -> Frame:
        network = random_network(genotype, num_classes).to(device, case.torch_dtype)
        x = torch.zeros(batch, 3, *size, device=device, dtype=case.torch_dtype)

        def frame() -> torch.Tensor:
            with use_backend("reference"), torch.inference_mode():
                return network(x)

        return frame

    made_on = measured_on(device, "measured", "eager", case.torch_dtype, batch)
    return FrameTimer(build, device, made_on)
