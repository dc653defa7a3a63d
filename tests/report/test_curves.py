"""Curves of a run: one panel for what was logged, no display needed."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lgcnet_fast.report.curves import draw_curves


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_panels_grow_with_what_was_logged(tmp_path: Path) -> None:
    search = [{"step": s, "epoch": 0, "loss": 3.0 - s, "temperature": 1.0} for s in range(30)]
    search.append({"step": 30, "epoch": 0, "argmax_ms": 8.0, "entropy": 1.9, "loss": None})
    finetune = [{"step": 1, "epoch": 0, "loss": 2.0}, {"step": 2, "epoch": 0, "miou": 0.3}]
    assert draw_curves({"search": search[:2]}, tmp_path / "one.png")
    assert draw_curves({"search": search, "finetune": finetune}, tmp_path / "two.png")
    assert size(tmp_path / "two.png")[1] > size(tmp_path / "one.png")[1] > 0


def test_nothing_logged_draws_nothing(tmp_path: Path) -> None:
    assert not draw_curves({"search": [], "other": [{"step": 1, "loss": 1.0}]}, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
