"""Compiling the kernels of many engines before any of them is timed."""

from __future__ import annotations

import torch

from lgcnet_fast.benchmark import engines
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
    timer.prepare([genotype], silent)
    ((work, (item,), _),) = called
    # What is sent can be run there: it builds the engine and runs it.
    work(item)
