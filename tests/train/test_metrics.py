"""Scores and the metrics log."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lgcnet_fast.train.metrics import Confusion, MetricsLog, read_metrics


def test_confusion_against_counting_by_hand():
    confusion = Confusion(3)
    target = torch.tensor([[0, 0, 1, 1], [2, 255, 1, 0]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 0]], dtype=torch.uint8)
    confusion.add(predicted, target)
    assert confusion.counts.tolist() == [[2, 1, 0], [0, 2, 1], [1, 0, 0]]
    assert confusion.iou().tolist() == pytest.approx([2 / 4, 2 / 4, 0])
    assert confusion.miou() == pytest.approx(1 / 3)
    assert confusion.pixel_accuracy() == pytest.approx(4 / 7)
    assert confusion.constant_miou() == pytest.approx(3 / 7 / 3)


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (4, 9, 9), generator=generator)
    predicted = torch.randint(0, 5, (4, 9, 9), generator=generator)
    whole, parts = Confusion(5), Confusion(5)
    whole.add(predicted, target)
    for i in range(4):
        parts.add(predicted[i], target[i])
    assert torch.equal(whole.counts, parts.counts)


def test_absent_class_does_not_count_and_nothing_gives_zero():
    confusion = Confusion(3)
    assert confusion.miou() == 0
    assert confusion.constant_miou() == 0
    confusion.add(torch.zeros(2, 2), torch.zeros(2, 2))
    assert confusion.miou() == 1
    assert math.isnan(confusion.iou()[2])


def test_continuing_keeps_each_step_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(6):
        log.write(step // 2, step, loss=step / 10)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')  # the process died here

    log = MetricsLog(tmp_path, 2)
    for step in range(4, 8):
        log.write(step // 2, step, loss=step / 10)
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == 0.7


def test_lines_are_there_at_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(0, 1, loss=0.5, miou=None)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"epoch": 0, "step": 1, "loss": 0.5, "miou": None}
    ]
    log.close()


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path / "other", 0, enabled=False)
    log.write(0, 1, loss=0.5)
    log.flush()
    log.close()
    assert not (tmp_path / "other").exists()
