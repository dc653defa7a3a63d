"""The search: its trajectory, its pressure towards low latency, its failures."""

from __future__ import annotations

import pytest
import torch

from lgcnet_fast.errors import ConfigError, RunError
from lgcnet_fast.latency.predict import latency_range
from lgcnet_fast.train import search as search_module
from lgcnet_fast.train.checkpoint import read_checkpoint
from lgcnet_fast.train.derive import derive
from lgcnet_fast.train.metrics import read_metrics
from lgcnet_fast.train.search import search


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, module, epochs):
    """The process dies right after the checkpoint of that epoch is written."""
    save = module.save_checkpoint

    def save_and_die(path, stage, epochs_done, *rest):
        save(path, stage, epochs_done, *rest)
        if epochs_done == epochs:
            raise Interrupted

    monkeypatch.setattr(module, "save_checkpoint", save_and_die)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("target", [None, 8.0])
def test_continuing_gives_the_trajectory_of_a_straight_run(new_run, monkeypatch, target):
    changes = {} if target is None else {"search__latency_target_ms": target}
    straight = new_run("straight", **changes)
    search(straight)

    broken = new_run("broken", **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, search_module, 2)
        with pytest.raises(Interrupted):
            search(broken)
    assert not broken.stage_done("search")
    search(new_run("broken", **changes))

    states = [
        read_checkpoint(run.checkpoint_path("search"), "search") for run in (straight, broken)
    ]
    assert same(*states)
    logs = [
        read_metrics(run.stage_folder("search") / "metrics.jsonl") for run in (straight, broken)
    ]
    assert logs[0] == logs[1]
    assert straight.stage_result("search") == broken.stage_result("search")


def expected_ms(run) -> list[float]:
    lines = read_metrics(run.stage_folder("search") / "metrics.jsonl")
    return [line["expected_ms"] for line in lines if "entropy" in line]


def test_latency_loss_lowers_the_expected_latency_monotonically(new_run):
    """LGCNet check: beta = 0 against 0.05 and a value between, on the same task and seed."""
    ends = []
    for beta in (0.0, 0.05, 0.5):
        run = new_run(f"beta-{beta}", search__beta=beta)
        search(run)
        ends.append(expected_ms(run))
    assert ends[0][-1] > ends[1][-1] > ends[2][-1]
    assert all(before > after for before, after in zip(ends[2], ends[2][1:], strict=False))


@pytest.mark.parametrize("form", ["linear_ms", "log_total", "log_cell", "log_edge"])
def test_every_latency_form_pushes_down(new_run, form):
    free, pushed = (
        new_run("free", search__beta=0.0),
        new_run("pushed", search__beta=1.0, search__latency_loss=form),
    )
    search(free)
    search(pushed)
    assert expected_ms(pushed)[-1] < expected_ms(free)[-1]


def test_metrics_hold_loss_terms_and_collapse_monitor(new_run):
    run = new_run(search__epochs=2)
    search(run)
    lines = read_metrics(run.stage_folder("search") / "metrics.jsonl")
    steps, epochs = lines[0::2], lines[1::2]
    assert [line["temperature"] for line in steps] == [1.0, 0.03]
    assert [line["lr"] for line in steps] == pytest.approx([0.025, 0.013])
    for line in steps:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["latency_loss"])
        assert 0 <= line["train_miou"] <= 1
        assert 1 < line["sampled_ms"] < 19
    for line in epochs:
        assert line["share_none"] + line["share_skip"] == line["share_light"]
        assert 0 < line["entropy"] < 1.4
        assert line["argmax_ms"] >= 1
        assert "sampled_ms" not in line
    # One name, one thing: the last step of an epoch and its end look at the same parameters.
    expected = [[line["expected_ms"] for line in part] for part in (steps, epochs)]
    assert expected[0] == pytest.approx(expected[1])


def test_accumulation_equals_the_larger_batch(new_run):
    """Without augmentation, ignored pixels and noise, two halves are one whole."""
    batch = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=batch)
    labels = torch.randint(0, 19, (4, 16, 16), generator=batch)
    results = []
    for accumulate in (1, 2):
        run = new_run(f"accumulate-{accumulate}", search__accumulate=accumulate)
        searcher = make_searcher(run)
        searcher.wrapped = FixedNoise(searcher.network)
        parts = zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)
        terms, _, _ = searcher.step(parts)
        results.append((terms, searcher.network.state_dict()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


class FixedNoise(torch.nn.Module):
    """The same Z in every forward pass."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, temperature):
        self.network.noise.manual_seed(5)
        return self.network(images, temperature)


def make_searcher(run):
    searcher = search_module._searcher(run, search_module.latency_predictor(run), 10)
    searcher.set_epoch(0)
    return searcher


def test_one_backward_reaches_weights_and_architecture(new_run):
    searcher = make_searcher(new_run())
    before = {name: p.clone() for name, p in searcher.network.named_parameters()}
    searcher.step([(torch.randn(2, 3, 17, 17), torch.zeros(2, 17, 17, dtype=torch.long))])
    for name, parameter in searcher.network.named_parameters():
        assert not torch.equal(before[name], parameter), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(new_run, precision):
    run = new_run(precision=precision, search__epochs=1)
    search(run)
    assert run.stage_done("search")


def test_nan_names_the_remedy_and_keeps_the_last_checkpoint(new_run, monkeypatch):
    run = new_run()
    original = search_module.upsample_cross_entropy
    calls = []

    def breaks_in_the_third_epoch(logits, labels):
        calls.append(1)
        return original(logits, labels) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(search_module, "upsample_cross_entropy", breaks_in_the_third_epoch)
    with pytest.raises(RunError, match="nan in epoch 3.*search.weight_lr.*epoch 2 is kept"):
        search(run)
    state = read_checkpoint(run.checkpoint_path("search"), "search")
    assert state["epochs_done"] == 2
    assert all(tensor.isfinite().all() for tensor in state["parts"]["model"].values())


def test_too_much_accumulation_is_refused(new_run):
    with pytest.raises(ConfigError, match="search.accumulate = 9.*only 2 batches"):
        search(new_run(search__accumulate=9))


def test_damaged_checkpoint_is_refused(new_run):
    run = new_run()
    path = run.checkpoint_path("search")
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(RunError, match="delete it to start the stage 'search' afresh"):
        search(run)


# -- derive ---------------------------------------------------------------------------------


def test_derive_needs_a_finished_search(new_run):
    with pytest.raises(RunError, match="run the stage search first"):
        derive(new_run())


def test_derive_takes_the_argmax(new_run):
    run = new_run(search__epochs=1)
    search(run)
    result = derive(run)
    arch = read_checkpoint(run.checkpoint_path("search"), "search")["parts"]["arch"]
    genotype, _ = run.space.discretise({"rows": arch["rows"]})
    assert run.genotype() == genotype
    assert result["changes"] == []
    assert result["latency_ms"] == pytest.approx(run.stage_result("search")["argmax_ms"])


@pytest.mark.parametrize("target", [3.0, 7.0, 13.0, 18.5])
def test_derived_genotype_meets_the_target(new_run, target):
    run = new_run(search__latency_target_ms=target)
    search(run)
    assert derive(run)["latency_ms"] == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("target", [0.9, 20.0])
def test_target_outside_the_range_is_refused_before_any_work(new_run, target):
    run = new_run(search__latency_target_ms=target)
    with pytest.raises(ConfigError, match=r"1\.000 to 19\.000 ms"):
        search(run)
    assert not run.stage_folder("search").exists()


def test_random_strategy_depends_on_the_seed_only(new_run):
    genotypes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = new_run(name, seed=seed, search__strategy="random")
        search(run)
        derive(run)
        genotypes.append(run.genotype())
    assert genotypes[0] == genotypes[1] != genotypes[2]


def test_min_fps_rejects_slow_draws(new_run):
    run = new_run(search__strategy="random", search__min_fps=150.0)
    search(run)
    assert derive(run)["fps"] > 150


def test_min_fps_beyond_the_space_ends(new_run, monkeypatch):
    monkeypatch.setattr("lgcnet_fast.train.derive.RANDOM_DRAWS", 50)
    run = new_run(search__strategy="random", search__min_fps=5000.0)
    search(run)
    with pytest.raises(RunError, match="none of 50 random genotypes.*lower search.min_fps"):
        derive(run)


# -- the real space -------------------------------------------------------------------------

SMALL_LGCNET = {
    "name": "lgcnet",
    "cells": 3,
    "reductions": [1, 2],
    "taps": [0, 1, 2],
    "widths": [4, 8, 16],
    "gcn_width": 8,
}


def test_lgcnet_continues_as_if_never_interrupted(new_run, monkeypatch):
    changes = {"space": SMALL_LGCNET, "search__epochs": 2, "search__batch_size": 2}
    changes |= {"latency__size": [97, 193], "data__synthetic_images": 4}
    straight, broken = new_run("straight", **changes), new_run("broken", **changes)
    search(straight)
    with monkeypatch.context() as patch:
        interrupt_after(patch, search_module, 1)
        with pytest.raises(Interrupted):
            search(broken)
    search(broken)
    states = [
        read_checkpoint(run.checkpoint_path("search"), "search") for run in (straight, broken)
    ]
    assert same(*states)


def test_lgcnet_meets_a_latency_target(new_run):
    changes = {"space": SMALL_LGCNET, "search__epochs": 1, "data__synthetic_images": 4}
    probe = search_module.latency_predictor(new_run("probe", **changes))
    reachable = latency_range(probe.space, probe.model)
    target = 0.7 * reachable.low + 0.3 * reachable.high
    run = new_run("run", search__latency_target_ms=target, **changes)
    search(run)
    result = derive(run)
    assert result["latency_ms"] == pytest.approx(target, rel=0.05)
    assert all("target" in change or "reached" in change for change in result["changes"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lgcnet_searches_on_a_gpu(new_run, precision):
    changes = {"space": SMALL_LGCNET, "device": "cuda", "search__latency_target_ms": None}
    run = new_run(precision=precision, **changes)
    search(run)
    losses = read_metrics(run.stage_folder("search") / "metrics.jsonl")
    assert all(line["loss"] > 0 for line in losses if "loss" in line)
    assert derive(run)["latency_ms"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_search_step_does_not_wait_for_the_gpu(new_run):
    run = new_run(
        space=SMALL_LGCNET, device="cuda", precision="bf16", search__latency_target_ms=0.5
    )
    searcher = make_searcher(run)
    images = torch.randn(2, 3, 33, 33, device="cuda")
    batch = [(images, torch.zeros(2, 33, 33, dtype=torch.long, device="cuda"))]
    searcher.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        searcher.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
