"""From uint8 images to label maps, as an application has it."""

from __future__ import annotations

from typing import Any

import pytest

from bench.deploy_server import BRIEF, PROTOCOL, DeployServer
from bench.device import CUDA
from bench.training.command import TINY_SIZE, TINY_SPACE

SIZE, GENOTYPE, SPACE = (
    ((769, 1537), "reference", {}) if CUDA else (TINY_SIZE, "random-0", TINY_SPACE)
)
STOCK = "graph-nhwc" if CUDA else "eager-nchw"


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_frame(dtype: str, backend: str, guard: Any) -> None:
    if dtype == "fp16" and not CUDA:
        pytest.skip("fp16: too slow on the CPU to mean anything")
    case = {"size": SIZE, "dtype": dtype}
    server = DeployServer(PROTOCOL if CUDA else BRIEF)
    arguments = {"genotype": GENOTYPE, "space": SPACE, "ours": backend}
    found = server.check(case, **arguments)
    assert found["right"], found
    server.build(case, **arguments, stock=STOCK)
    times = server.times()
    frames = {name: [1 / rate for rate in timing.round_fps] for name, timing in times.items()}
    guard(f"{backend} deploy {GENOTYPE} {SIZE[0]}x{SIZE[1]} {dtype}", frames)
