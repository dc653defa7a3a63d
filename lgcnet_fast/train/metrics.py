"""Scores of segmentation, and the log of a stage: JSON lines and TensorBoard scalars."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgcnet_fast.files import replacing

_said_without_tensorboard = False


class Confusion:
    """Counts of (true class, predicted class) over pixels, kept on the device."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Adds integer maps of equal shape; target values outside the classes are ignored."""
        classes = self.num_classes
        target, predicted = target.long(), predicted.long()
        counted = (target >= 0) & (target < classes)
        pairs = torch.where(counted, target * classes + predicted, classes * classes)
        counts = torch.bincount(pairs.flatten(), minlength=classes * classes + 1)
        self.counts += counts[:-1].view(classes, classes)

    def iou(self) -> Tensor:
        """(classes,) float64 on the CPU; NaN for a class in neither target nor prediction."""
        counts = self.counts.cpu().double()
        hit = counts.diagonal()
        return hit / (counts.sum(0) + counts.sum(1) - hit)

    def miou(self) -> float:
        """Mean over the classes that occur; 0 if nothing was counted."""
        return mean_of_present(self.iou())

    def pixel_accuracy(self) -> float:
        counts = self.counts.cpu().double()
        return float(counts.diagonal().sum() / counts.sum().clamp(min=1))

    def constant_miou(self) -> float:
        """mIoU of the best prediction of one class everywhere, over the classes in the target."""
        shares = self.counts.sum(1).cpu().double()
        present = int((shares > 0).sum())
        return float(shares.max() / shares.sum()) / present if present else 0.0


def mean_of_present(iou: Tensor) -> float:
    """Mean of the entries that are not NaN; 0 if all are."""
    present = iou[~iou.isnan()]
    return float(present.mean()) if len(present) else 0.0


class MetricsLog:
    """`metrics.jsonl` and, where the extra is installed, `tensorboard/` of one stage folder.

    After continuing from `epochs_done`, lines of later epochs (written after the last checkpoint)
    and a torn last line are removed, so that every step appears once.
    """

    def __init__(self, folder: Path, epochs_done: int, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["epoch"] < epochs_done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        with replacing(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)
        self._board = _open_tensorboard(folder / "tensorboard", kept)

    def write(self, epoch: int, step: int, **values: float | int | None) -> None:
        """One line; `step` counts optimiser steps from the start of the stage."""
        if not self.enabled:
            return
        self._file.write(json.dumps({"epoch": epoch, "step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes the lines durable; called before a checkpoint, which must not be ahead of them."""
        if self.enabled:
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            if self._board is not None:
                self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; empty if there is none."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("epoch"), int):
            lines.append(values)
    return lines


def _open_tensorboard(folder: Path, kept: list[dict[str, Any]]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        global _said_without_tensorboard
        if not _said_without_tensorboard:
            print(
                "TensorBoard is not installed; scalars go to metrics.jsonl only "
                '(pip install "lgcnet_fast[tensorboard]" adds it)',
                file=sys.stderr,
            )
        _said_without_tensorboard = True
        return None
    # What was written after the checkpoint is hidden from this step on.
    purge_step = kept[-1]["step"] + 1 if kept else None
    return SummaryWriter(str(folder), purge_step=purge_step)
