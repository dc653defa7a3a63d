"""Pretraining, finetuning, evaluation, and all stages together."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lgcnet_fast.errors import ConfigError, DataError, GenotypeError, RunError
from lgcnet_fast.space.genotype import save_genotype
from lgcnet_fast.train import finetune as finetune_module
from lgcnet_fast.train import pretrain as pretrain_module
from lgcnet_fast.train.checkpoint import read_checkpoint
from lgcnet_fast.train.derive import derive
from lgcnet_fast.train.evaluate import evaluate, reduce_labels, score
from lgcnet_fast.train.finetune import finetune
from lgcnet_fast.train.metrics import read_metrics
from lgcnet_fast.train.pipeline import STAGES, check, open_runs, run_all, run_stage
from lgcnet_fast.train.pretrain import learning_rate, pretrain
from tests.train.conftest import make_config
from tests.train.test_search import Interrupted, interrupt_after, same
from tests.train.toy import ToyGenotype

GENOTYPE = ToyGenotype(ops=("conv3", "conv1", "skip", "conv3", "none", "conv1"))


def derived(run):
    """The run with a genotype in place, as after the stage derive."""
    save_genotype(GENOTYPE, run.genotype_path)
    return run


@pytest.mark.parametrize(
    ("stage", "module", "epochs"),
    [("pretrain", pretrain_module, 1), ("finetune", finetune_module, 2)],
)
def test_continuing_gives_the_trajectory_of_a_straight_run(
    new_run, monkeypatch, stage, module, epochs
):
    changes = {"finetune__ema": 0.9, "finetune__augmentation": {"crop": [33, 33], "colour": 0.2}}
    straight = derived(new_run("straight", **changes))
    run_stage(straight, stage)
    broken = derived(new_run("broken", **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, module, epochs)
        with pytest.raises(Interrupted):
            run_stage(broken, stage)
    run_stage(broken, stage)
    states = [read_checkpoint(run.checkpoint_path(stage), stage) for run in (straight, broken)]
    assert same(*states)
    weights = [load_file(run.weights_path(stage)) for run in (straight, broken)]
    assert same(*weights)
    logs = [read_metrics(run.stage_folder(stage) / "metrics.jsonl") for run in (straight, broken)]
    assert logs[0] == logs[1]


# -- pretrain -------------------------------------------------------------------------------


def test_pretraining_learns_and_hands_its_backbone_over(new_run):
    run = derived(new_run(pretrain__epochs=12, pretrain__schedule="cosine"))
    result = pretrain(run)
    lines = read_metrics(run.stage_folder("pretrain") / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert 0 <= result["top1"] <= 1
    backbone = load_file(run.weights_path("pretrain"))
    trainer = finetune_module._trainer(run)
    assert same(dict(trainer.network.backbone.state_dict()), backbone)


def test_pretraining_may_be_left_out(new_run):
    run = derived(new_run(pretrain__enabled=False))
    assert "skipped" in pretrain(run)
    assert not run.weights_path("pretrain").exists()


def test_learning_rates_of_both_recipes(new_run):
    config = new_run().config.pretrain
    decaying = config.model_copy(update={"schedule": "exponential", "lr": 0.1, "lr_decay": 0.5})
    assert [learning_rate(decaying, epoch) for epoch in range(3)] == [0.1, 0.05, 0.025]
    cosine = config.model_copy(
        update={"schedule": "cosine", "lr": 1.0, "epochs": 12, "warmup_epochs": 2}
    )
    rates = [learning_rate(cosine, epoch) for epoch in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))


# -- finetune -------------------------------------------------------------------------------


def test_finetuning_lowers_the_loss_on_the_poly_schedule(new_run):
    run = derived(new_run(finetune__epochs=10, finetune__loss="cross_entropy"))
    result = finetune(run)
    lines = read_metrics(run.stage_folder("finetune") / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"]
    # Two steps an epoch, logged at the second.
    expected = [0.05 * (1 - (2 * epoch + 1) / 20) ** 0.9 for epoch in range(10)]
    assert [line["lr"] for line in steps] == pytest.approx(expected)
    scores = [line["miou"] for line in lines if "miou" in line]
    assert len(scores) == 5
    assert result["best_miou"] == max(scores)


def test_last_epoch_is_the_result(new_run):
    run = derived(new_run(finetune__epochs=2))
    finetune(run)
    model = read_checkpoint(run.checkpoint_path("finetune"), "finetune")["parts"]["model"]
    assert same(dict(model), load_file(run.weights_path("finetune")))


def test_moving_average_is_the_result_where_asked_for(new_run):
    run = derived(new_run(finetune__epochs=2, finetune__ema=0.5))
    finetune(run)
    parts = read_checkpoint(run.checkpoint_path("finetune"), "finetune")["parts"]
    weights = load_file(run.weights_path("finetune"))
    averaged = {name: t for name, t in parts["ema"].items() if name.startswith("module.")}
    assert same({name[7:]: t for name, t in averaged.items()}, weights)
    assert not same(dict(parts["model"]), weights)


def test_rare_classes_weigh_more(new_run):
    run = derived(new_run(finetune__class_weights="inverse_log"))
    weights = finetune_module._trainer(run).class_weights
    shares = finetune_module.label_shares(run, ("train",))
    assert shares.sum().item() == pytest.approx(1)
    assert weights.argmin() == shares.argmax()
    torch.testing.assert_close(weights, 1 / torch.log(1.02 + shares))


def test_coarse_labels_need_cityscapes(new_run):
    with pytest.raises(ConfigError, match="coarse_epochs"):
        finetune(derived(new_run(finetune__coarse_epochs=1)))


def test_coarse_phase_has_its_own_schedule(new_run, monkeypatch):
    monkeypatch.setattr(finetune_module, "COARSE_SPLITS", ("train",))
    monkeypatch.setattr(finetune_module, "COARSE_DATA", "synthetic")
    run = derived(new_run(finetune__coarse_epochs=2, finetune__epochs=2))
    finetune(run)
    lines = read_metrics(run.stage_folder("finetune") / "metrics.jsonl")
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[0] == rates[2] > rates[1] == rates[3]


def test_finetuning_needs_a_genotype(new_run):
    with pytest.raises(RunError, match="run the stage derive first"):
        finetune(new_run())


# -- evaluate -------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Predicts class 1 on the right half of the image."""

    def forward(self, images):
        logits = torch.zeros(len(images), 2, 16, 16)
        logits[:, 1, :, 8:], logits[:, 0, :, :8] = 5, 5
        return logits


def test_protocols_on_known_predictions():
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[..., 32:] = 1
    labels[..., 0] = 1  # a column that the reduced labels keep and a row of them drops
    batch = [(torch.zeros(1, 3, 32, 32), labels, (0,))]
    scores = score(Oracle(), batch, ("full", "bisenet_speed"), 2, torch.device("cpu"))
    assert scores["full"].counts.tolist() == [[31 * 64, 0], [64, 32 * 64]]
    assert scores["bisenet_speed"].counts.tolist() == [[3 * 8, 0], [8, 4 * 8]]


def test_labels_are_reduced_by_nearest_neighbour():
    labels = torch.arange(20 * 17).view(1, 20, 17) % 256
    assert torch.equal(reduce_labels(labels, 8)[0], labels[0, [0, 10]][:, [0, 8]])
    assert reduce_labels(labels, 1) is labels
    assert reduce_labels(torch.full((1, 3, 4), 255), 8).tolist() == [[[255]]]


def test_evaluation_lists_every_class(new_run):
    run = derived(new_run(finetune__epochs=1))
    finetune(run)
    evaluate(run)
    stored = json.loads(run.evaluation_path.read_text())
    assert list(stored["protocols"]) == ["full", "bisenet_speed"]
    full = stored["protocols"]["full"]
    assert len(full["class_iou"]) == 19
    present = [iou for iou in full["class_iou"].values() if iou is not None]
    assert full["miou"] == pytest.approx(sum(present) / len(present))
    assert 0 < full["constant_miou"] < 0.2


def test_evaluation_needs_trained_weights(new_run):
    with pytest.raises(RunError, match="run the stage finetune first"):
        evaluate(derived(new_run()))


# -- all stages -----------------------------------------------------------------------------

SHORT = {"search__epochs": 1, "pretrain__epochs": 1, "finetune__epochs": 1}


def test_two_seeds_and_their_summary(tmp_path, monkeypatch):
    config = make_config(tmp_path / "cache", seeds=[0, 1], **SHORT)
    summary = run_all(tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    rows = [summary["seeds"][seed] for seed in ("0", "1")]
    for key in ("latency_ms", "parameters", "miou_full", "miou_bisenet_speed"):
        values = [row[key] for row in rows]
        assert summary["mean"][key] == pytest.approx(sum(values) / 2)
        assert summary["std"][key] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)

    def must_not_run(run):
        raise AssertionError("a finished stage ran again")

    for name in STAGES:
        monkeypatch.setitem(STAGES, name, must_not_run)
    assert run_all(tmp_path / "run", config) == summary


def test_one_seed_lives_in_the_folder_itself(tmp_path):
    config = make_config(tmp_path / "cache", search__strategy="random", **SHORT)
    summary = run_all(tmp_path / "run", config)
    assert (tmp_path / "run" / "genotype.json").exists()
    assert summary["std"]["latency_ms"] is None
    several = make_config(tmp_path / "cache", seeds=[0, 1])
    with pytest.raises(RunError, match="holds a run of one seed"):
        open_runs(tmp_path / "run", several)


def test_given_genotype_needs_no_search(new_run, tmp_path):
    path = tmp_path / "genotype.json"
    save_genotype(GENOTYPE, path)
    run = new_run(genotype=str(path))
    check(run)
    assert "skipped" in run_stage(run, "search")
    assert derive(run)["origin"] == "given"
    assert run.genotype() == GENOTYPE


def test_genotype_of_another_space_is_refused_first(new_run):
    with pytest.raises(GenotypeError, match="belongs to the space 'lgcnet'"):
        check(new_run(genotype="reference"))


def test_missing_data_is_refused_first(new_run, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        check(new_run(data__name="camvid", data__root=str(tmp_path / "nowhere")))


def test_missing_label_of_val_is_refused_first(new_run, tmp_path):
    root = tmp_path / "camvid"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for suffix in ("image", "label"):
            Image.new("L", (32, 32)).save(root / split / f"{suffix}.png")
        (root / f"{split}.txt").write_text(f"{split}/image.png {split}/label.png")
    run = new_run(data__name="camvid", data__root=str(root))
    check(run)
    (root / "val" / "label.png").unlink()
    with pytest.raises(DataError, match="val/label.png: no such file"):
        check(run)


@pytest.mark.parametrize(
    ("stage", "module", "loss"),
    [("pretrain", pretrain_module, "F"), ("finetune", finetune_module, "upsample_ohem")],
)
def test_nan_stops_the_stage_with_a_remedy(new_run, monkeypatch, stage, module, loss):
    def nan(logits, *_, **__):
        return logits.sum() * float("nan")

    broken = type("Functional", (), {"cross_entropy": staticmethod(nan)}) if loss == "F" else nan
    monkeypatch.setattr(module, loss, broken)
    run = derived(new_run())
    with pytest.raises(RunError, match=rf"{stage}: the loss became nan in epoch 1.*{stage}\.lr"):
        run_stage(run, stage)
    assert not run.checkpoint_path(stage).exists()


def test_infinite_parameters_never_reach_a_checkpoint(new_run, monkeypatch):
    run = derived(new_run())
    step = finetune_module.Finetuner.step

    def blow_up(trainer, batches):
        loss = step(trainer, batches)
        next(trainer.network.parameters()).data.fill_(float("inf"))
        return loss

    monkeypatch.setattr(finetune_module.Finetuner, "step", blow_up)
    with pytest.raises(RunError, match="NaN or infinite|became (nan|inf)"):
        finetune(run)
    assert not run.checkpoint_path("finetune").exists()


def test_tensorboard_gets_the_scalars_where_it_is_installed(new_run):
    pytest.importorskip("tensorboard")
    run = derived(new_run(finetune__epochs=1))
    finetune(run)
    assert list((run.stage_folder("finetune") / "tensorboard").glob("events.out.*"))


def test_too_little_memory_names_the_key(new_run, monkeypatch):
    def too_large(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(STAGES, "finetune", too_large)
    with pytest.raises(RunError, match=r"finetune: cpu has not enough.*finetune\.batch_size = 4"):
        run_stage(derived(new_run()), "finetune")
