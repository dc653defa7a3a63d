"""The command lines of the training steps."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from bench.device import require_gpu
from bench.options import Deadline, image_size, parser
from bench.results_file import Rows, provenance
from bench.training.case import OURS, STOCK, TrainingCase
from bench.training.compare import Comparison, Plan, identity

TINY_SPACE = {"cells": 5, "reductions": (1, 3), "widths": (8, 8, 8)}
TINY_SUPERNET = {**TINY_SPACE, "cells": 3, "reductions": (1, 2), "taps": (0, 1, 2)}
"""A supernet has kernels enough to compile with fewer cells."""
TINY_SIZE = (64, 64)


def training_parser(description: str, batch: int, size: str) -> argparse.ArgumentParser:
    options = parser(description)
    options.add_argument("--ours", choices=OURS, default="ours-triton")
    options.add_argument("--stock", choices=STOCK, nargs="*", default=STOCK)
    options.add_argument("--batch", type=int, nargs="+", default=[batch])
    options.add_argument("--size", type=image_size, nargs="+", default=[image_size(size)])
    options.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--steps", type=int, default=5, help="a round")
    options.add_argument(
        "--build-seconds", type=float, default=320, help="a subject that takes longer is given up"
    )
    options.add_argument(
        "--compile-jobs",
        type=int,
        default=1,
        help="processes that fill torch.compile's cache for compiled subjects beforehand",
    )
    options.add_argument(
        "--first",
        action="store_true",
        help="time to the first step at full speed, and nothing else",
    )
    options.add_argument("--dry", action="store_true", help="a tiny network on the CPU")
    return options


def grid(options: argparse.Namespace) -> list[tuple[int, tuple[int, int]]]:
    """Batch and size of every case."""
    return [(2, TINY_SIZE)] if options.dry else list(itertools.product(options.batch, options.size))


def run(stage: str, options: argparse.Namespace, cases: Sequence[TrainingCase]) -> None:
    require_gpu(options.dry)
    deadline = Deadline(options.seconds)
    rows = Rows(options.out, provenance(options.commit), identity)
    plan = Plan(
        stage,
        options.ours,
        options.stock,
        options.rounds,
        options.steps,
        options.build_seconds,
        options.compile_jobs,
    )
    comparison = Comparison(plan, rows, deadline)
    if options.first:
        comparison.first_steps(cases[0])
    else:
        comparison.run(cases)
