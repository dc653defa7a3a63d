"""Batches that cannot work: refused before any stage begins."""

from __future__ import annotations

import pytest

from lgcnet_fast.errors import ConfigError
from lgcnet_fast.train.pipeline import check
from lgcnet_fast.train.trial import check_batches

TINY_LGCNET = {"cells": 3, "reductions": [1, 2], "taps": [0, 1, 2], "widths": [4, 8, 16]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune__accumulate": 3}, "finetune.accumulate = 3.*only 2 batches"),
        ({"search__accumulate": 3}, "search.accumulate = 3.*only 2 batches"),
        *(
            (
                {f"{stage}__batch_size": 1, f"{stage}__{key}": value, "space": TINY_LGCNET},
                rf"{stage}\.batch_size = 1 with {stage}\..* = 16x16: .*more than 1 value",
            )
            for stage, key, value in (
                ("search", "augmentation", {"crop": [16, 16]}),
                ("pretrain", "image_size", 16),
                ("finetune", "augmentation", {"crop": [16, 16]}),
            )
        ),
    ],
)
def test_batches_that_cannot_work_are_refused_first(new_run, changes, message):
    run = new_run(**changes)
    with pytest.raises(ConfigError, match=message):
        check(run)
    assert not run.stage_folder("search").exists()


def test_a_search_that_does_not_train_is_not_tried(new_run):
    small = {"crop": [16, 16]}
    changes = {"space": TINY_LGCNET, "search__batch_size": 1, "search__augmentation": small}
    check_batches(new_run(search__strategy="random", **changes))
