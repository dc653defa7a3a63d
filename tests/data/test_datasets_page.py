"""The example of docs/datasets.md is a description that the package reads."""

from __future__ import annotations

import re
from pathlib import Path

from lgcnet_fast.data.folder import read_description

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def test_the_documented_description_is_valid(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "dataset.toml").write_text(example, encoding="utf-8")
    description = read_description(tmp_path / "dataset.toml")
    assert list(description.splits) == ["train", "val"]
    assert description.class_ids() == [(1, 4), (2,)]
