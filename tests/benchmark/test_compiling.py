"""Compiling the kernels of many engines before any of them is timed."""

from __future__ import annotations

import torch

from lgcnet_fast.benchmark import engines
from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.deploy.replay import FusedEngine
from lgcnet_fast.latency.networks import silent
from lgcnet_fast.space.genotype import load_genotype


def test_engines_that_compile_nothing_start_no_processes(monkeypatch):
    called = []
    monkeypatch.setattr(engines, "in_processes", lambda *arguments: called.append(arguments))
    timer = engines.engine_timer((33, 65), 3, torch.device("cpu"), "fp32")
    genotype = load_genotype("reference")
    timer.prepare([genotype], silent)
    assert called == []
    monkeypatch.setattr(engines.EngineRecipe, "compiles", lambda recipe, genotype: True)
    monkeypatch.setattr(engines, "can_take_notes", lambda: False)
    timer.prepare([genotype], silent)
    ((work, (item,), _, _),) = called
    # What is sent can be run there: it builds the engine and runs it.
    work(item)


def test_a_rehearsal_starts_every_kernel_of_an_engine(monkeypatch):
    started = []

    class Network:
        image = torch.zeros(1, 33, 65, 3, dtype=torch.uint8)
        calls = (lambda: started.append("first"), lambda: started.append("second"))

        def write_labels(self, labels):
            started.append(tuple(labels.shape))

    monkeypatch.setattr(FusedEngine, "_in_memory", lambda engine, size, batch, pixels: Network())
    case = Case((33, 65))
    recipe = engines.EngineRecipe(case, 3, torch.device("cpu"), "triton")
    recipe.rehearse(load_genotype("reference"))
    assert started == ["first", "second", (1, 33, 65)]
