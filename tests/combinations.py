"""Parametrisations that a GPU tests in full, and Triton's interpreter in part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch


def some_combinations(
    names: str, *values: Sequence[Any], indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Every combination of the values, which are one list for each of the names.

    Without a GPU all are slow but as many as the longest list is long, in which each value
    occurs: the k-th takes the k-th value of each list, and from the start again of shorter ones.
    indirect: names of fixtures that take their values.
    """
    longest = max(map(len, values))
    chosen = {tuple(k % len(of_one) for of_one in values) for k in range(longest)}
    combinations = []
    for places in product(*(range(len(of_one)) for of_one in values)):
        combination = [of_one[place] for of_one, place in zip(values, places, strict=True)]
        combinations.append(_parameters(combination, slow=places not in chosen))
    return pytest.mark.parametrize(names, combinations, indirect=indirect)


def some_cases(
    name: str, cases: Sequence[Any], *default: int, indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Every case; without a GPU those at other places than the default ones are slow."""
    every = [_parameters([case], slow=place not in default) for place, case in enumerate(cases)]
    return pytest.mark.parametrize(name, every, indirect=indirect)


def _parameters(values: Sequence[Any], slow: bool) -> Any:
    marks = [pytest.mark.slow] if slow and not torch.cuda.is_available() else []
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))
