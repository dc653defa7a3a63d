"""The example of docs/deploy.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.deploy.run_folders import make_run_folder
from tests.deploy.test_segmenter import picture

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"


def test_the_documented_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    make_run_folder(tmp_path / "runs" / "camvid" / "seed-0")
    Image.fromarray(picture((48, 64))).save("street.png")
    exec(compile(example, str(PAGE), "exec"), {})
    assert re.search(r"\d+% of the picture is road", capsys.readouterr().out)
    with Image.open("street_labels.png") as labels:
        assert labels.size == (64, 48)
