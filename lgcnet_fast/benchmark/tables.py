"""Building a latency table, and checking one, with any of the runtimes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lgcnet_fast.benchmark.case import dtype_named
from lgcnet_fast.benchmark.engines import engine_timer, plain_timer
from lgcnet_fast.config import Size
from lgcnet_fast.errors import ConfigError, TableError
from lgcnet_fast.latency.build import build_table
from lgcnet_fast.latency.check import LatencyCheck, check_predictions
from lgcnet_fast.latency.engine_table import FULL_FIT, build_engine_table
from lgcnet_fast.latency.measure import FULL_EFFORT
from lgcnet_fast.latency.networks import FrameTimer, Progress, silent
from lgcnet_fast.latency.providers import EagerProvider, RooflineProvider, check_runtime
from lgcnet_fast.latency.table import LookupTable
from lgcnet_fast.space.base import SearchSpace
from lgcnet_fast.space.genotype import Genotype

NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def make_table(
    space: SearchSpace,
    size: Size,
    num_classes: int,
    runtime: str,
    device: torch.device,
    dtype: str = "fp32",
    batch: int = 1,
    backend: str = "auto",
    progress: Progress = silent,
) -> LookupTable:
    """The latency table of `space` for inputs of `size` (height, width).

    runtime: eager measures every operation by itself, deploy fits whole engines, roofline
    estimates a Titan Xp. backend: of engines. Raises `ConfigError` for an unknown runtime or
    dtype, or one that the runtime lacks.
    """
    check_runtime(runtime)
    if runtime == "roofline":
        if dtype != "fp32" or batch != 1:
            raise ConfigError("the roofline is that of one image in fp32; leave dtype and batch")
        return build_table(space, size, num_classes, RooflineProvider(), progress)
    torch_dtype = dtype_named(dtype)
    if runtime == "eager":
        provider = EagerProvider(device, batch, FULL_EFFORT, torch_dtype)
        return build_table(space, size, num_classes, provider, progress)
    timer = engine_timer(size, num_classes, device, dtype, batch, backend)
    return build_engine_table(space, size, num_classes, timer, FULL_FIT, progress)


def check_latencies(
    table: LookupTable,
    space: SearchSpace,
    device: torch.device,
    runtime: str | None = None,
    count: int = 50,
    given: Mapping[str, Genotype] | None = None,
    progress: Progress = silent,
) -> LatencyCheck:
    """`check_predictions` on this device.

    runtime: what runs the networks, eager or deploy; by default what the table was made with.
    Raises `ConfigError` for a runtime that cannot be measured.
    """
    timer = _timer(table, device, runtime or table.made_on.runtime)
    return check_predictions(table, space, timer, count, given, progress)


def _timer(table: LookupTable, device: torch.device, runtime: str) -> FrameTimer:
    check_runtime(runtime)
    if runtime == "roofline":
        raise ConfigError(
            "a roofline cannot be measured; say with --runtime eager or --runtime deploy what the "
            "table's ranking is to be compared with"
        )
    dtype = NAMES.get(table.made_on.dtype)
    if dtype is None:
        raise TableError(
            f"the latency table was made with {table.made_on.dtype!r}; only {', '.join(NAMES)} can "
            "be measured"
        )
    given = (table.size, table.num_classes, device, dtype, table.made_on.batch)
    if runtime == "eager":
        return plain_timer(*given)
    return engine_timer(*given, backend=table.made_on.backend or "auto")
