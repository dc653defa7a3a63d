"""Captured training steps: their trajectory is that of eager steps, on a tape and on a GPU."""

from __future__ import annotations

import pytest
import torch

from lgcnet_fast.errors import RunError
from lgcnet_fast.train import finetune as finetune_module
from lgcnet_fast.train import pretrain as pretrain_module
from lgcnet_fast.train import search as search_module
from lgcnet_fast.train.capture import CapturedStep, captured
from lgcnet_fast.train.checkpoint import read_checkpoint
from lgcnet_fast.train.distributed import Ranks
from lgcnet_fast.train.metrics import read_metrics
from lgcnet_fast.train.pipeline import run_stage
from tests.train.tape import TapeRecorder
from tests.train.test_pipeline import derived
from tests.train.test_search import SMALL_LGCNET, Interrupted, interrupt_after, same

MODULES = {"search": search_module, "pretrain": pretrain_module, "finetune": finetune_module}


@pytest.fixture
def on_tape(monkeypatch):
    """`on_tape(stage)` records the steps of that stage from now on; returns the recorder."""

    def replace(stage):
        recorder = TapeRecorder()

        def record(run, name, step, generators=()):
            recorder.generators = generators
            return CapturedStep(name, step, recorder)

        monkeypatch.setattr(MODULES[stage], "captured", record)
        return recorder

    return replace


def outcome(run, stage):
    """Checkpoint and metrics of a finished stage."""
    state = read_checkpoint(run.checkpoint_path(stage), stage)
    return state, read_metrics(run.stage_folder(stage) / "metrics.jsonl")


CASES = {
    "search": ("search", {"search__latency_target_ms": 8.0}),
    "search fp16": ("search", {"precision": "fp16"}),
    "search accumulate": ("search", {"search__batch_size": 2, "search__accumulate": 2}),
    "search lgcnet": (
        "search",
        {
            "space": SMALL_LGCNET,
            "search__epochs": 3,
            "search__batch_size": 2,
            "data__synthetic_images": 4,
        },
    ),
    "pretrain": ("pretrain", {}),
    "finetune": ("finetune", {"finetune__ema": 0.9, "finetune__class_weights": "inverse_log"}),
    "finetune bf16": ("finetune", {"precision": "bf16", "finetune__loss": "cross_entropy"}),
}


@pytest.mark.parametrize(("stage", "changes"), CASES.values(), ids=CASES)
def test_recorded_steps_follow_the_trajectory_of_eager_ones(new_run, on_tape, stage, changes):
    eager, recorded = derived(new_run("eager", **changes)), derived(new_run("recorded", **changes))
    run_stage(eager, stage)
    recorder = on_tape(stage)
    run_stage(recorded, stage)
    assert (recorder.recordings, recorder.rehearsals) == (1, 1)
    assert same(outcome(recorded, stage), outcome(eager, stage))


@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_a_run_may_continue_with_the_switch_flipped(new_run, on_tape, monkeypatch, stage):
    straight, broken = derived(new_run("straight")), derived(new_run("broken"))
    run_stage(straight, stage)
    with monkeypatch.context() as patch:
        interrupt_after(patch, MODULES[stage], 2)
        with pytest.raises(Interrupted):
            run_stage(broken, stage)
    on_tape(stage)
    run_stage(derived(new_run("broken", cuda_graph=False)), stage)
    assert same(outcome(broken, stage), outcome(straight, stage))


def doubling(recorder):
    """A step that doubles the first tensor of its only batch."""
    return CapturedStep("search", lambda batches: next(iter(batches))[0] * 2, recorder)


def test_every_shape_has_its_own_recording():
    recorder = TapeRecorder()
    step = doubling(recorder)
    for value in range(1, 4):
        for size in (2, 3):
            batch = (torch.full((size,), float(value)),)
            assert step([batch]).tolist() == [2.0 * value] * size
            # The recording has its own copy: the loader may do with the batch what it likes.
            batch[0].zero_()
    assert recorder.recordings == 2


def test_what_cannot_be_captured_names_the_switch():
    def waits(batches):
        return torch.zeros(1) * next(iter(batches))[0].sum().item()

    step = CapturedStep("finetune", waits, TapeRecorder())
    batch = [(torch.ones(2),)]
    step(batch)
    with pytest.raises(RunError, match=r"finetune: .*waits for the device.*cuda_graph = false"):
        step(batch)


def test_too_little_memory_is_no_failure_of_the_capture():
    class Full(TapeRecorder):
        def record(self, function):
            raise torch.OutOfMemoryError("CUDA out of memory")

    step, batch = doubling(Full()), [(torch.ones(2),)]
    step(batch)
    with pytest.raises(torch.OutOfMemoryError):
        step(batch)


def test_without_a_gpu_steps_run_as_they_are(new_run):
    def step(batches):
        return torch.zeros(())

    assert captured(new_run(), "search", step) is step


def test_several_processes_say_that_they_run_eagerly(new_run, caplog):
    def step(batches):
        return torch.zeros(())

    run = new_run(cuda_graph=True)
    run.device, run.ranks = torch.device("cuda"), Ranks(0, 2)
    assert captured(run, "search", step) is step
    assert "2 processes train together, so their steps run eagerly" in caplog.text
