"""Where a table's milliseconds come from. A deployed runtime adds its own provider here."""

from __future__ import annotations

import difflib
import gc
from abc import ABC, abstractmethod

import torch

from lgcnet_fast.errors import ConfigError
from lgcnet_fast.latency.hardware import device_name, driver
from lgcnet_fast.latency.measure import FULL_EFFORT, Effort, Measurement, measure
from lgcnet_fast.latency.roofline import roofline_ms
from lgcnet_fast.latency.table import Provenance
from lgcnet_fast.space.base import LutModule

BATCHES = {"measured": 1, "measured_batch8": 8}
ROOFLINE = "roofline_titanxp"
PROVIDERS = (*BATCHES, ROOFLINE)


class LatencyProvider(ABC):
    """Tells the latency of one image in one operation."""

    @abstractmethod
    def provenance(self) -> Provenance: ...

    @abstractmethod
    def measure(self, lut: LutModule) -> Measurement:
        """Milliseconds an image."""


class EagerProvider(LatencyProvider):
    """Runs the plain PyTorch modules in float32; `batch` images a run share its launches."""

    def __init__(self, device: torch.device, batch: int = 1, effort: Effort = FULL_EFFORT) -> None:
        self.device = device
        self.batch = batch
        self.effort = effort

    def provenance(self) -> Provenance:
        names = {batch: name for name, batch in BATCHES.items()}
        return Provenance(
            provider=names.get(self.batch, f"measured_batch{self.batch}"),
            device=device_name(self.device),
            driver=driver(self.device),
            torch=torch.__version__,
            cuda=torch.version.cuda or "",
            runtime="eager",
            batch=self.batch,
        )

    def measure(self, lut: LutModule) -> Measurement:
        module = lut.module.to(self.device)
        inputs = [
            torch.randn(self.batch * images, *shape, device=self.device)
            for images, *shape in lut.input_shapes
        ]
        try:
            timed = measure(module, inputs, self.effort)
        finally:
            del module, inputs
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return Measurement(timed.median_ms / self.batch, timed.spread, timed.runs, timed.capped)


class RooflineProvider(LatencyProvider):
    """Estimates a Titan Xp; needs no GPU."""

    def provenance(self) -> Provenance:
        return Provenance(
            provider=ROOFLINE, device="NVIDIA TITAN Xp (estimated)", runtime="roofline"
        )

    def measure(self, lut: LutModule) -> Measurement:
        return Measurement(roofline_ms(lut.module, lut.input_shapes), 0.0, 1, capped=False)


def make_provider(name: str, device: torch.device) -> LatencyProvider:
    """Raises `ConfigError` with the nearest name."""
    if name == ROOFLINE:
        return RooflineProvider()
    if name in BATCHES:
        return EagerProvider(device, BATCHES[name])
    near = difflib.get_close_matches(name, PROVIDERS, n=1, cutoff=0)
    raise ConfigError(f"unknown latency provider {name!r}; did you mean {near[0]!r}?")
