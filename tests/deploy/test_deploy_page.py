"""The examples of docs/deploy.md run as they stand, one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.deploy.run_folders import make_run_folder
from tests.deploy.test_segmenter import picture

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"


def test_the_documented_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    make_run_folder(tmp_path / "runs" / "camvid" / "seed-0")
    Image.fromarray(picture((48, 64))).save("street.png")
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"\d+% of the picture is road", printed)
    assert printed.count("(48, 64)") == 3
    with Image.open("street_labels.png") as labels:
        assert labels.size == (64, 48)
