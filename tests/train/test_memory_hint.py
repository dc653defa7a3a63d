"""What would fit, by a made-up memory model and by the real one."""

from __future__ import annotations

import pytest
import torch

from lgcnet_fast.config import load_config
from lgcnet_fast.train import memory_hint
from lgcnet_fast.train.memory_hint import SPARE, out_of_memory, what_fits
from tests.train.test_pipeline import derived

FIXED, IMAGE, PIXEL = 1_000_000, 5_000, 8


def predict(config):
    height, width = config.search.augmentation.crop
    return FIXED + config.search.batch_size * (IMAGE + PIXEL * height * width)


def configured(batch=16, crop="[769, 769]"):
    changes = (f"search.batch_size={batch}", f"search.augmentation.crop={crop}")
    return load_config(preset="paper", overrides=changes)


def test_the_largest_batch_and_crop_that_fit():
    config, available = configured(), 40_000_000
    fit = what_fits(config, "search", available, predict)
    assert fit.needed == predict(config) > available
    assert fit.batch_size == 7
    usable = (1 - SPARE) * available
    sizes = {batch: predict(configured(batch)) for batch in (7, 8)}
    assert sizes[7] <= usable < sizes[8]
    # LGCNet's crops are of the form 16 k + 1.
    assert fit.crop == (513, 513)
    assert predict(configured(crop="[513, 513]")) <= usable < predict(configured(crop="[529, 529]"))


def test_other_crops_keep_their_shape():
    fit = what_fits(configured(crop="[360, 480]"), "search", 8_000_000, predict)
    assert fit.crop is not None
    assert all(side % 32 == 0 for side in fit.crop)
    assert fit.crop[0] / fit.crop[1] == pytest.approx(0.75, rel=0.1)


def test_batches_are_shared_out_evenly():
    fit = what_fits(configured(), "search", 40_000_000, predict, processes=4)
    assert fit.batch_size == 4


def test_nothing_fits_beside_the_parameters():
    fit = what_fits(configured(), "search", 900_000, predict)
    assert (fit.batch_size, fit.crop) == (None, None)


def test_a_single_image_cannot_become_fewer():
    assert what_fits(configured(1), "search", 2_000_000, predict).batch_size is None


@pytest.mark.parametrize("stage", ["search", "pretrain", "finetune"])
def test_message_of_every_stage(new_run, monkeypatch, stage):
    run = derived(new_run())
    needed = memory_hint._predictor(run, stage)(run.config)
    monkeypatch.setattr(memory_hint, "available_bytes", lambda device: 0.8 * needed)
    message = out_of_memory(run, stage)
    before, after = message.split(" GiB with ")
    assert before.startswith(f"{stage}: cpu has not enough memory: by the memory model")
    assert f"{stage}.batch_size = {getattr(run.config, stage).batch_size}" in after
    advice = after.split(". ")[1]
    assert f"{stage}.batch_size = " in advice and advice.endswith(" would fit")
    assert ("accumulate" in advice) == (stage != "pretrain")


def test_message_where_the_step_should_fit(new_run):
    assert 'data.cache = "ram" may help' in out_of_memory(new_run(), "search")


def test_message_without_a_working_model(new_run, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(memory_hint, "step_memory", fails)
    message = out_of_memory(new_run(), "search")
    assert message.startswith("search: cpu has not enough memory; lower search.batch_size")
    assert "lower evaluate.batch_size" in out_of_memory(new_run(), "evaluate")


def test_memory_of_the_host():
    assert memory_hint.available_bytes(torch.device("cpu")) > 2**20
