"""Feeds pytest-benchmark with times measured in turn, and holds them against committed ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.device import CUDA, use_fastest_convolutions
from bench.guard.clock import RECORDED
from bench.guard.verdict import Verdict, baseline_path, committed_ratios, fault, table
from bench.kernels.timing import copy_bandwidth
from bench.results_file import RESULTS, current_commit, provenance, write_json

VERDICTS = pytest.StashKey[list[Verdict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write the ratios of this device to this file")
    parser.addoption(
        "--baseline", type=Path, default=RESULTS, help="folder of the ratios to compare with"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[VERDICTS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=RECORDED))


@pytest.fixture(scope="session", autouse=True)
def convolutions() -> None:
    use_fastest_convolutions()


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Bytes a second of a copy, in this run."""
    return copy_bandwidth()


@pytest.fixture(scope="session")
def committed(pytestconfig: pytest.Config) -> Mapping[str, float]:
    return committed_ratios(_baseline(pytestconfig))


@pytest.fixture
def guard(
    benchmark: Any, committed: Mapping[str, float], pytestconfig: pytest.Config
) -> Iterator[Any]:
    """Takes seconds a round of ours and of every alternative; fails on a regression."""

    def judge(
        name: str,
        times: Mapping[str, Sequence[float]],
        floor_s: float | None = None,
        **extra: Any,
    ) -> None:
        stock = {other: seconds for other, seconds in times.items() if other != "ours"}
        verdict = Verdict.of(name, times["ours"], stock, floor_s)
        RECORDED.load(times["ours"])
        benchmark.pedantic(lambda: None, rounds=len(times["ours"]))
        benchmark.extra_info.update(verdict.as_row() | extra)
        pytestconfig.stash[VERDICTS].append(verdict)
        regression = fault(verdict, committed)
        if regression:
            pytest.fail(regression, pytrace=False)

    yield judge


@pytest.fixture(params=["triton", "cuda", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """On a GPU the kernels, elsewhere the reference."""
    if request.param == "reference" and CUDA:
        pytest.skip("the reference is what the kernels are compared with")
    if request.param != "reference" and not CUDA:
        pytest.skip(f"{request.param}: needs a CUDA GPU, an interpreter's times mean nothing")
    return str(request.param)


def _baseline(config: pytest.Config) -> Path:
    return baseline_path(provenance("")["device"], config.getoption("--baseline"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    verdicts = config.stash.get(VERDICTS, [])
    if not verdicts:
        return
    origin, path = provenance(current_commit()), _baseline(config)
    terminalreporter.section(f"ratios on {origin['device']}")
    for line in table(verdicts, committed_ratios(path)):
        terminalreporter.write_line(line)
    if not path.exists():
        terminalreporter.write_line(f"nothing to compare with: no {path.name}")
    record = config.getoption("--record")
    if record:
        write_json(record, {**origin, "rows": [verdict.as_row() for verdict in verdicts]})
