"""Combinations of parameters that are tested by default."""

from __future__ import annotations

import pytest
import torch

from tests.combinations import some_cases, some_combinations


@pytest.mark.parametrize("gpu", [False, True])
def test_each_value_occurs_by_default_and_every_pair_at_all(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    names, parameters = some_combinations("a, b", (1, 2), ("x", "y", "z")).args
    assert names == "a, b"
    assert [p.id for p in parameters] == ["1-x", "1-y", "1-z", "2-x", "2-y", "2-z"]
    assert [p.values for p in parameters][1] == (1, "y")
    default = [p.id for p in parameters if not p.marks]
    assert default == ([p.id for p in parameters] if gpu else ["1-x", "1-z", "2-y"])


@pytest.mark.parametrize("gpu", [False, True])
def test_cases_at_other_places_are_slow(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    _, parameters = some_cases("case", ("x", "y", "z"), 0, 2).args
    assert [bool(p.marks) for p in parameters] == [False, not gpu, False]
