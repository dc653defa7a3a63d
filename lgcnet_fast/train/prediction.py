"""Latency as the stages use it: the run's table and what it says about genotypes."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

from lgcnet_fast.errors import RunError, TableError
from lgcnet_fast.latency.build import open_table
from lgcnet_fast.latency.predict import check_target, latency_range, latency_scale, predict_ms
from lgcnet_fast.latency.table import LookupTable, load_table, save_table
from lgcnet_fast.space.base import LatencyModel, SearchSpace
from lgcnet_fast.space.genotype import Genotype
from lgcnet_fast.train.distributed import barrier
from lgcnet_fast.train.run import Run


@dataclass(frozen=True)
class LatencyPredictor:
    """Predicted latency of a space's networks, in the milliseconds of one table."""

    space: SearchSpace
    model: LatencyModel
    """On the CPU."""
    scale: float
    """Multiplier that brings this device's milliseconds to the paper's device."""
    description: str
    """Device, runtime and numeric type of the table."""

    def milliseconds(self, genotype: Genotype) -> float:
        """Whole network, constant part included."""
        return predict_ms(self.space, self.model, genotype)

    def trained_with(self) -> LatencyModel:
        """A copy that moves to the training device."""
        return copy.deepcopy(self.model)


def latency_predictor(run: Run) -> LatencyPredictor:
    """The table recorded in the run folder, or at first the configuration's, then recorded.

    Raises `TableError` if it cannot serve, and `ConfigError` with the range if the latency target
    of the configuration is out of reach.
    """
    table = _run_table(run)
    model = run.space.latency_model(table.milliseconds, run.config.latency.size, run.num_classes)
    target_ms = run.config.search.latency_target_ms
    if target_ms is not None:
        check_target(target_ms, latency_range(run.space, model))
    scale = latency_scale(run.space, model)
    return LatencyPredictor(run.space, model, scale, table.description)


def _run_table(run: Run) -> LookupTable:
    path = run.latency_table_path
    if run.ranks.first and not path.exists():
        _record_table(run)
    barrier(run.ranks)
    try:
        return load_table(path)
    except TableError as error:
        raise RunError(f"{error}\n  or delete it: then that of latency.table is recorded") from None


def _record_table(run: Run) -> None:
    latency = run.config.latency
    table, complaints = open_table(
        latency.table, run.space, latency.size, run.num_classes, run.device
    )
    for complaint in complaints:
        print(f"warning: {complaint}", file=sys.stderr)
    save_table(table, run.latency_table_path)
