"""Steps of search and finetuning, each one CUDA graph, as plain PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest

from bench.device import CUDA, release_memory
from bench.rounds import alternate
from bench.training import finetune, search
from bench.training.case import TrainingCase
from bench.training.command import TINY_SIZE, TINY_SPACE
from bench.training.gradients import judge
from bench.training.server import GATE_BATCH, GATE_SIZE, timed

STOCK = ("graph-nchw", "graph-nhwc") if CUDA else ("eager-nchw",)
ROUNDS, WARM_UP, STEPS = 15, 3, 3
PRECISIONS = {"triton": "bf16", "cuda": "fp32", "reference": "fp32"}
STAGES = {
    "search": (search, TrainingCase(16, (256, 512), "", {"widths": (32, 64, 128)})),
    "finetune": (finetune, TrainingCase(16, (360, 480), "", genotype="reference")),
}
TINY = TrainingCase(2, TINY_SIZE, "fp32", TINY_SPACE, genotype="random-0")


@pytest.mark.parametrize("stage", STAGES)
def test_step(stage: str, backend: str, guard: Any) -> None:
    module, case = STAGES[stage]
    case = case.with_precision(PRECISIONS[backend]) if CUDA else TINY
    ours = f"ours-{backend}"
    small = case.shrunk(GATE_BATCH, GATE_SIZE)
    found = {name: module.gradients(name, small) for name in ("truth", "eager-nchw", ours)}
    truth = found["truth"]
    assert judge(found[ours].errors(truth), found["eager-nchw"].errors(truth), case.precision) == []
    steps = {name: module.make_step(name, case) for name in (ours, *STOCK)}
    clocks = {name: (lambda step=step: timed(step, STEPS)) for name, step in steps.items()}
    clocks["ours"] = clocks.pop(ours)
    times = alternate(clocks, ROUNDS, WARM_UP)
    del steps, clocks
    release_memory()
    guard(f"{backend} {stage} step {case}", times)
