"""The example of docs/training_steps.md runs."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "training_steps.md"


def test_the_memory_example_prints_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {})
    assert re.fullmatch(r"\d+ MiB, of which activations \d+\n", capsys.readouterr().out)
