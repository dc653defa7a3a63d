"""Parametrisations that a GPU tests in full, and Triton's interpreter in part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch


def some_combinations(names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """Every combination of the values, which are one list for each of the names.

    Without a GPU all are slow but as many as the longest list is long, in which each value
    occurs: the k-th takes the k-th value of each list, and from the start again of shorter ones.
    """
    longest = max(map(len, values))
    chosen = {tuple(k % len(of_one) for of_one in values) for k in range(longest)}
    combinations = []
    for places in product(*(range(len(of_one)) for of_one in values)):
        slow = places not in chosen and not torch.cuda.is_available()
        combination = [of_one[place] for of_one, place in zip(values, places, strict=True)]
        combinations.append(
            pytest.param(
                *combination,
                marks=[pytest.mark.slow] if slow else [],
                id="-".join(map(str, combination)),
            )
        )
    return pytest.mark.parametrize(names, combinations)
