"""Engines whose time is a known function of the genotype, with what fusion shares and saves."""

from __future__ import annotations

import random

from lgcnet_fast.latency.table import Provenance
from lgcnet_fast.nn.cell import CELL_EDGES
from lgcnet_fast.parallel import all_of_them
from lgcnet_fast.space.lgcnet_genotype import LGCNetGenotype

OPERATIONS = {
    "none": 0.0,
    "max3": 0.3,
    "skip": 0.1,
    "conv3": 2.0,
    "sep3": 1.6,
    "dil3_2": 0.7,
    "dil3_4": 0.8,
    "dil3_8": 0.9,
}
"""Milliseconds that an operation adds to a node at stride 4."""
LAUNCH = 0.5
PREPROCESSING = 0.9
CONSTANT = 3.0
UP = {"deconv": 1.0, "interp": 0.4}


def fused_ms(genotype: LGCNetGenotype) -> float:
    """One launch a node that computes something, one for each input that is read."""
    total = CONSTANT
    for cell, ops in zip(genotype.layout.cells, genotype.cells, strict=True):
        scale = 4 / cell.stride
        edges = list(zip(CELL_EDGES, ops, strict=True))
        if ops[0] == ops[1] == "none":
            edges = edges[:4]
        running = [(source, target, op) for (source, target), op in edges if op != "none"]
        total += sum(OPERATIONS[op] * scale for *_, op in running)
        total += LAUNCH * len({target for _, target, _ in running})
        total += PREPROCESSING * scale * len({source for source, *_ in running} & {"i1", "i2"})
    return total + (_fusion_ms(genotype) if genotype.fusion else 0.0)


def _fusion_ms(genotype: LGCNetGenotype) -> float:
    assert genotype.fusion is not None
    total = 0.0
    for edge in genotype.fusion.graph.edges:
        op = genotype.fusion.ops[edge.name]
        cost = UP[op] if edge.kind == "up" else 0.5 + 0.1 * len(op)
        total += cost * len(edge.sources) / 2**edge.level
    return total


class FakeTimer:
    """Tells `fused_ms` with noise; counts what it was asked."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.random = random.Random(0)
        self.asked: list[LGCNetGenotype] = []

    def provenance(self) -> Provenance:
        return Provenance(provider="fitted", device="Fake GPU", runtime="deploy", dtype="float16")

    def prepare(self, genotypes, progress, enough=all_of_them) -> int:
        """One after another."""
        self.prepared = 0
        while self.prepared < len(genotypes) and not enough(self.prepared):
            self.prepared += 1
        progress(self.prepared, len(genotypes))
        return self.prepared

    def milliseconds(self, genotype: LGCNetGenotype) -> float:
        self.asked.append(genotype)
        return fused_ms(genotype) * (1 + self.noise * self.random.gauss(0, 1))
