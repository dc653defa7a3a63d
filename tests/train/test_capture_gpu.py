"""CUDA graphs of training steps on a GPU: trajectory, generators, resume, failures, no waiting."""

from __future__ import annotations

import gc
import re
import subprocess
import sys

import pytest
import torch

from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops.availability import why_not
from lgcnet_fast.train import finetune as finetune_module
from lgcnet_fast.train import pretrain as pretrain_module
from lgcnet_fast.train import search as search_module
from lgcnet_fast.train.capture import CapturedStep, CudaRecorder
from lgcnet_fast.train.checkpoint import read_checkpoint
from lgcnet_fast.train.memory import step_memory
from lgcnet_fast.train.metrics import read_metrics
from lgcnet_fast.train.pipeline import run_stage
from tests.train.test_pipeline import derived
from tests.train.test_search import SMALL_LGCNET, Interrupted, interrupt_after, make_searcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODULES = {"search": search_module, "pretrain": pretrain_module, "finetune": finetune_module}


@pytest.fixture
def gpu_run(new_run):
    """Makes derived runs on the GPU in fp32, six steps a stage."""

    def make(name, **changes):
        epochs = {"search__epochs": 3, "pretrain__epochs": 3, "finetune__epochs": 3}
        on_gpu = {"device": "cuda", "cuda_graph": True}
        return derived(new_run(name, **{**on_gpu, **epochs, **changes}))

    return make


def train(run, stage):
    """Runs the stage with algorithms that round alike; its checkpoint and losses."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        run_stage(run, stage)
    lines = read_metrics(run.stage_folder(stage) / "metrics.jsonl")
    state = read_checkpoint(run.checkpoint_path(stage), stage)
    return state, [line["loss"] for line in lines if "loss" in line]


def assert_same_trajectory(actual, expected):
    """The generators exactly; numbers up to the rounding of sums in another order."""
    (state, losses), (wanted, wanted_losses) = actual, expected
    torch.testing.assert_close(losses, wanted_losses, rtol=2e-3, atol=2e-4)
    for name, generator in wanted["generators"].items():
        assert torch.equal(state["generators"][name], generator), name
    for name in {"model", "arch", "ema"} & wanted["parts"].keys():
        torch.testing.assert_close(
            dict(state["parts"][name]), dict(wanted["parts"][name]), rtol=2e-3, atol=2e-4
        )


CASES = {
    "search": ("search", {"search__latency_target_ms": 8.0}),
    "search accumulate": ("search", {"search__batch_size": 2, "search__accumulate": 2}),
    "search from pinned memory": ("search", {"data__cache": "ram"}),
    "pretrain": ("pretrain", {}),
    "finetune": ("finetune", {"finetune__ema": 0.9, "finetune__class_weights": "inverse_log"}),
    "finetune accumulate": ("finetune", {"finetune__batch_size": 2, "finetune__accumulate": 2}),
}


@pytest.mark.parametrize(("stage", "changes"), CASES.values(), ids=CASES)
def test_captured_steps_follow_the_trajectory_of_eager_ones(gpu_run, stage, changes):
    eager = train(gpu_run("eager", cuda_graph=False, **changes), stage)
    assert_same_trajectory(train(gpu_run("captured", **changes), stage), eager)


@pytest.mark.parametrize("resume_captured", [True, False])
@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_an_interrupted_captured_run_continues(gpu_run, monkeypatch, stage, resume_captured):
    straight = train(gpu_run("straight"), stage)
    with monkeypatch.context() as patch:
        interrupt_after(patch, MODULES[stage], 1)
        with pytest.raises(Interrupted):
            train(gpu_run("broken"), stage)
    broken = train(gpu_run("broken", cuda_graph=resume_captured), stage)
    assert_same_trajectory(broken, straight)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_supernet_is_captured_in_every_precision(gpu_run, precision):
    changes = {"space": SMALL_LGCNET, "precision": precision, "latency__size": [97, 193]}
    (_, eager), (state, captured) = (
        train(gpu_run(f"graph-{graph}", cuda_graph=graph, **changes), "search")
        for graph in (False, True)
    )
    # Batch statistics of tiny maps amplify rounding: alike, not equal.
    torch.testing.assert_close(captured, eager, rtol=0.05, atol=0.05)
    assert all(tensor.isfinite().all() for tensor in state["parts"]["model"].values())


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_supernet_is_captured_on_fused_operations(gpu_run, backend):
    reason = why_not(backend, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    changes = {"space": SMALL_LGCNET, "precision": "bf16", "latency__size": [97, 193]}
    try:
        (_, eager), (_, captured) = (
            train(gpu_run(f"graph-{graph}", cuda_graph=graph, backend=backend, **changes), "search")
            for graph in (False, True)
        )
    except BackendError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(captured, eager, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_memory_model_is_right_within_15_percent(gpu_run, backend):
    """Of the paper's supernet; without what cuDNN takes in the first step to time algorithms."""
    crop = {"crop": [257, 257]}
    changes = {"space": {"name": "lgcnet"}, "precision": "bf16", "backend": backend}
    run = gpu_run("run", search__augmentation=crop, search__batch_size=16, **changes)
    predicted = step_memory(run.config, "search", run.num_classes, "bf16", run.device)
    gc.collect()
    before = torch.cuda.memory_allocated()
    searcher = make_searcher(run)
    recorder = CudaRecorder(run.device, [searcher.network.noise])
    step = CapturedStep("search", searcher.step, recorder)
    images = torch.randn(16, 3, 257, 257, device="cuda").to(memory_format=torch.channels_last)
    batch = [(images, torch.zeros(16, 257, 257, dtype=torch.long, device="cuda"))]
    step(batch)
    torch.cuda.reset_peak_memory_stats()
    step(batch)
    measured = torch.cuda.max_memory_allocated() - before
    assert predicted.total == pytest.approx(measured, rel=0.15), predicted


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_derived_networks_are_captured_in_half_precision(gpu_run, stage, precision):
    _, losses = train(gpu_run(precision, precision=precision), stage)
    assert all(0 < loss < 20 for loss in losses)


def test_noise_continues_through_replays_as_through_eager_steps():
    states, draws = [], []
    for capture in (False, True):
        generator = torch.Generator("cuda").manual_seed(3)

        def step(batches, generator=generator):
            ((x,),) = batches
            return x + torch.empty_like(x).exponential_(generator=generator)

        recorder = CudaRecorder(torch.device("cuda"), [generator])
        run = CapturedStep("search", step, recorder) if capture else step
        batch = (torch.zeros(1000, device="cuda"),)
        draws.append(torch.stack([run([batch]).clone() for _ in range(5)]))
        states.append(generator.get_state())
    assert torch.equal(*draws)
    assert torch.equal(*states)


def test_shapes_alternate():
    recorder = CudaRecorder(torch.device("cuda"), [])
    step = CapturedStep("search", lambda batches: next(iter(batches))[0] * 2, recorder)
    for value in range(1, 5):
        for size in (1000, 3000):
            batch = (torch.full((size,), float(value), device="cuda"),)
            assert torch.equal(step([batch]), torch.full((size,), 2.0 * value, device="cuda"))


FAILING = """
import torch
from lgcnet_fast.errors import RunError
from lgcnet_fast.train.capture import CapturedStep, CudaRecorder

generator = torch.Generator("cuda").manual_seed(0)

def waits(batches):
    ((x,),) = batches
    return torch.rand_like(x) * torch.rand(10, device="cuda", generator=generator).sum().item()

def draws(batches):
    ((x,),) = batches
    return x + torch.rand(10, device="cuda", generator=generator) + torch.rand_like(x)

batch = [(torch.ones(10, device="cuda"),)]
stream = torch.cuda.current_stream()
step = CapturedStep("search", waits, CudaRecorder(torch.device("cuda"), [generator]))
step(batch)
try:
    step(batch)
except RunError as error:
    print(error)
assert torch.cuda.current_stream() == stream
eager = draws(batch)
step = CapturedStep("search", draws, CudaRecorder(torch.device("cuda"), [generator]))
seen = [eager, *(step(batch).clone() for _ in range(3))]
assert len({float(x.sum()) for x in seen}) == 4
"""


def test_what_waits_for_the_gpu_names_the_switch():
    """And the process goes on: numbers are drawn, another step is captured."""
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match("search: .*cannot be captured.*cuda_graph = false", done.stdout), done.stdout


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stage", ["search", "pretrain", "finetune"])
def test_no_step_waits_for_the_gpu(gpu_run, stage, precision):
    changes = {"finetune__ema": 0.9, "finetune__class_weights": "inverse_log"}
    run = gpu_run("run", precision=precision, **changes)
    images = torch.randn(4, 3, 33, 33, device="cuda")
    labels = torch.zeros(4, 33, 33, dtype=torch.long, device="cuda")
    if stage == "search":
        step, batch = make_searcher(run).step, (images, labels)
    elif stage == "finetune":
        step, batch = finetune_module._trainer(run).step, (images, labels)
    else:
        step, batch = pretrain_module._trainer(run, 10).step, (images, labels[:, 0, 0])
    step([batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
