"""Frames of deployed engines, and the timers that latency tables are fitted to."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lgcnet_fast.benchmark.case import Case, dtype_named
from lgcnet_fast.benchmark.networks import random_network
from lgcnet_fast.benchmark.plain import TensorFrame, with_copies
from lgcnet_fast.config import Size
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.deploy.blueprint import Blueprint
from lgcnet_fast.deploy.engine import Engine
from lgcnet_fast.deploy.fold import fold
from lgcnet_fast.errors import ConfigError
from lgcnet_fast.latency.networks import FrameTimer
from lgcnet_fast.latency.providers import measured_on
from lgcnet_fast.latency.timing import Frame
from lgcnet_fast.space.base import SegmentationNetwork
from lgcnet_fast.space.genotype import Genotype


def unnamed_classes(count: int) -> ClassSet:
    """Names and colours for a network that has none."""
    names = tuple(f"class {number}" for number in range(count))
    return ClassSet("random", names, np.zeros((count, 3), np.uint8), output_ids=tuple(range(count)))


def network_blueprint(
    network: SegmentationNetwork, genotype: Genotype, num_classes: int, size: Size
) -> Blueprint:
    return Blueprint(genotype, unnamed_classes(num_classes), size, fold(network))


def engine_frame(blueprint: Blueprint, case: Case, device: torch.device) -> TensorFrame:
    """A frame of a deployed engine: uint8 images on the device to uint8 labels at their size.

    Raises `ConfigError` for a case that engines do not serve.
    """
    if not case.upsample:
        raise ConfigError("engines end with the label map; leave the logits to plain networks")
    case.check_device(device)
    engine = Engine(blueprint, device, case.dtype)
    images = case.images(device)

    def frame() -> Tensor:
        return torch.stack([engine.labels(image) for image in images])

    return with_copies(frame, images, case)


def engine_timer(
    size: Size, num_classes: int, device: torch.device, dtype: str, batch: int = 1
) -> FrameTimer:
    """Times the engines of genotypes, from image to label map, both on the device."""
    case = Case(size, batch, dtype)

    def build(genotype: Genotype) -> Frame:
        network = random_network(genotype, num_classes)
        return engine_frame(network_blueprint(network, genotype, num_classes, size), case, device)

    made_on = measured_on(device, "fitted", "deploy", dtype_named(dtype), batch)
    return FrameTimer(build, device, made_on)


def plain_timer(
    size: Size, num_classes: int, device: torch.device, dtype: str, batch: int = 1
) -> FrameTimer:
    """Times plain networks op by op, from normalised image to logits: what eager tables predict."""

    def build(genotype: Genotype) -> Frame:
        network = random_network(genotype, num_classes).to(device, dtype_named(dtype))
        x = torch.zeros(batch, 3, *size, device=device, dtype=dtype_named(dtype))

        def frame() -> Tensor:
            with torch.inference_mode():
                return network(x)

        return frame

    made_on = measured_on(device, "measured", "eager", dtype_named(dtype), batch)
    return FrameTimer(build, device, made_on)
