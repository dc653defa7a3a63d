"""Benchmarks of several subjects, and the gate in front of engines."""

from __future__ import annotations

import json

import pytest
import torch

from lgcnet_fast.benchmark import harness
from lgcnet_fast.benchmark.case import Case
from lgcnet_fast.benchmark.engines import engine_frame, engine_timer, plain_timer
from lgcnet_fast.benchmark.gate import check_labels
from lgcnet_fast.benchmark.harness import benchmark, entries
from lgcnet_fast.benchmark.subjects import Subject, open_subject
from lgcnet_fast.errors import BackendError, ConfigError, EngineError
from lgcnet_fast.latency.hardware import device_name, parse_clocks
from lgcnet_fast.latency.timing import Protocol
from tests.benchmark.nets import Choosy, tiny

CPU = torch.device("cpu")
SIZE = (33, 47)
QUICK = Protocol(2, 0.0, 1, 0.001, 2)


@pytest.fixture(scope="module")
def ours() -> Subject:
    return open_subject("reference", num_classes=5)


def module(network=None, name="tiny") -> Subject:
    return Subject(name, "module", (network or tiny()).eval())


# -- entries --------------------------------------------------------------------------------------


def test_runtimes_by_default(ours):
    onnx = Subject("a.onnx", "onnx")
    names = [entry.name for entry in entries([ours, module(), onnx], (), ("nchw", "nhwc"))]
    assert names == [
        "reference deploy",
        "tiny eager nchw",
        "tiny eager nhwc",
        "a.onnx onnxruntime",
    ]


def test_runtimes_as_asked_for(ours):
    found = entries([ours], ("eager", "deploy", "compile+graph"), ("nhwc",))
    assert [(entry.runtime, entry.layout) for entry in found] == [
        ("eager", "nhwc"),
        ("deploy", ""),
        ("compile+graph", "nhwc"),
    ]


def test_entries_that_cannot_be(ours):
    with pytest.raises(ConfigError, match="runtime 'turbo': must be one of eager, graph"):
        entries([ours], ("turbo",), ("nchw",))
    with pytest.raises(ConfigError, match="tiny: runtime 'deploy' takes networks of this project"):
        entries([module()], ("deploy",), ("nchw",))
    with pytest.raises(ConfigError, match="reference deploy: given more than once"):
        entries([ours, ours], (), ("nchw",))


# -- measurement ----------------------------------------------------------------------------------


def test_a_benchmark_of_several_subjects(ours):
    chosen = entries([ours], ("deploy", "eager"), ("nhwc",)) + entries([module()], (), ("nchw",))
    reports = []
    result = benchmark(
        chosen, Case(SIZE, 2), CPU, "auto", QUICK, lambda *report: reports.append(report)
    )
    assert reports == [(1, 2), (2, 2)]
    deploy, eager, other = result.rows
    assert deploy.agreement.equal > 0.95 and deploy.agreement.decided > 0.5
    assert eager.agreement is None and other.agreement is None
    assert all(row.timing.fps > 0 and row.timing.batch == 2 for row in result.rows)
    assert result.hardware.device == device_name(CPU)
    assert result.hardware.clocks is None and "CPU" in result.hardware.clocks_unknown
    values = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert [row["runtime"] for row in values["rows"]] == ["deploy", "eager", "eager"]
    assert values["rows"][0]["kind"] == "genotype" and values["rows"][2]["layout"] == "nchw"
    assert values["case"]["size"] == [33, 47] and values["protocol"]["rounds"] == 2


def test_accuracy_counts_at_its_own_size_only():
    subject = Subject("run", "run", tiny().eval(), size=SIZE, miou=61.5)
    chosen = entries([subject], ("eager",), ("nchw",))
    assert benchmark(chosen, Case(SIZE), CPU, protocol=QUICK).rows[0].miou == 61.5
    assert benchmark(chosen, Case((65, 65)), CPU, protocol=QUICK).rows[0].miou is None


def test_a_network_that_fails_on_the_images_is_named():
    chosen = entries([module(Choosy(), "choosy")], (), ("nchw",))
    told = "choosy eager nchw: fails on 1 images of 33x47 in fp32: RuntimeError: width must be"
    with pytest.raises(ConfigError, match=told) as raised:
        benchmark(chosen, Case(SIZE), CPU, protocol=QUICK)
    assert "\n" not in str(raised.value)


def test_a_bug_of_ours_stays_a_traceback(ours, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("bug")

    monkeypatch.setattr(harness, "engine_frame", broken)
    with pytest.raises(RuntimeError, match="bug"):
        benchmark(entries([ours], (), ()), Case(SIZE), CPU, protocol=QUICK)


def test_an_unknown_backend_is_refused(ours):
    with pytest.raises(BackendError):
        benchmark(entries([ours], (), ()), Case(SIZE), CPU, "opencl", QUICK)


# -- the gate -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(ours):
    from dataclasses import replace

    return engine_frame(replace(ours.blueprint, size=SIZE), Case(SIZE), CPU)()


def test_right_labels_pass(ours, labels):
    agreement = check_labels(labels, ours.network, Case(SIZE), CPU, "engine")
    assert agreement.equal > 0.99
    assert next(ours.network.parameters()).device == CPU


def test_one_wrong_pixel_is_enough(ours, labels):
    wrong = labels.clone()
    wrong[0, 16, 20] = (wrong[0, 16, 20] + 1) % 5
    with pytest.raises(EngineError, match=r"engine: labels 1 of 1551 pixels differently"):
        check_labels(wrong, ours.network, Case(SIZE), CPU, "engine")


def test_labels_that_nothing_decides_do_not_pass(labels):
    class Undecided(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(1, 5, 9, 12)

    with pytest.raises(EngineError, match=r"only 0.0% of the pixels"):
        check_labels(labels, Undecided(), Case(SIZE), CPU, "engine")


def test_engines_have_no_logits_to_offer(ours):
    with pytest.raises(ConfigError, match="engines end with the label map"):
        engine_frame(ours.blueprint, Case(SIZE, upsample=False), CPU)


# -- timers of tables -----------------------------------------------------------------------------


def test_timers_say_what_they_time(ours):
    genotype = ours.blueprint.genotype
    for make, runtime, provider in (
        (engine_timer, "deploy", "fitted"),
        (plain_timer, "eager", "measured"),
    ):
        timer = make(SIZE, 5, CPU, "fp32", 2)
        made = timer.provenance()
        assert (made.runtime, made.provider, made.dtype) == (runtime, provider, "float32")
        assert made.batch == 2 and timer.milliseconds(genotype) > 0


def test_clocks_are_read_or_the_reason_told():
    clocks, reason = parse_clocks("1785, 1980, 3201, 3201\n")
    assert str(clocks) == "SM 1785 of 1980 MHz, memory 3201 of 3201 MHz" and reason == ""
    for answer in ("", "[N/A], 1980, 3201, 3201", "No devices were found"):
        clocks, reason = parse_clocks(answer)
        assert clocks is None and answer in reason


@pytest.mark.gpu
def test_a_benchmark_on_a_gpu_states_its_clocks(ours):
    device = torch.device("cuda")
    chosen = entries([ours], ("deploy", "eager", "graph"), ("nchw", "nhwc"))
    result = benchmark(chosen, Case((97, 193), dtype="fp16"), device, protocol=QUICK)
    assert result.hardware.clocks is not None or result.hardware.clocks_unknown
    assert all(row.timing.host_us > 0 for row in result.rows)
