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

ROOFLINE = "roofline_titanxp"
"""What `latency.table` calls the table that needs no file."""
RUNTIMES = ("eager", "deploy", "roofline")


class LatencyProvider(ABC):
    """Tells the latency of one image in one operation."""

    @abstractmethod
    def provenance(self) -> Provenance: ...

    @abstractmethod
    def measure(self, lut: LutModule) -> Measurement:
        """Milliseconds an image."""


class EagerProvider(LatencyProvider):
    """Runs the plain PyTorch modules; `batch` images a run share its launches."""

    def __init__(
        self,
        device: torch.device,
        batch: int = 1,
        effort: Effort = FULL_EFFORT,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = device
        self.batch = batch
        self.effort = effort
        self.dtype = dtype

    def provenance(self) -> Provenance:
        provider = "measured" if self.batch == 1 else f"measured_batch{self.batch}"
        return measured_on(self.device, provider, "eager", self.dtype, self.batch)

    def measure(self, lut: LutModule) -> Measurement:
        module = lut.module.to(self.device, self.dtype)
        inputs = [
            torch.randn(self.batch * images, *shape, device=self.device, dtype=self.dtype)
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


def measured_on(
    device: torch.device,
    provider: str,
    runtime: str,
    dtype: torch.dtype,
    batch: int,
    backend: str = "",
) -> Provenance:
    """The provenance of what is measured now on `device`."""
    return Provenance(
        provider=provider,
        device=device_name(device),
        driver=driver(device),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        dtype=str(dtype).removeprefix("torch."),
        runtime=runtime,
        backend=backend,
        batch=batch,
    )


def check_runtime(name: str) -> None:
    """Raises `ConfigError` with the nearest name."""
    if name not in RUNTIMES:
        near = difflib.get_close_matches(name, RUNTIMES, n=1, cutoff=0)
        raise ConfigError(f"unknown runtime {name!r} of a latency table; did you mean {near[0]!r}?")
