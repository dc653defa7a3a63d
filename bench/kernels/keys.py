"""From the shape keys of tuning tables back to what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lgcnet_fast.errors import BackendError

T = TypeVar("T")


def case_of_key(key: str, read: Callable[..., T], key_of: Callable[[T], str]) -> T:
    """What `read` makes of the dtype and the shapes in a `shape_key`, each a tuple.

    Raises `BackendError` unless the first shape is that of a map and `key_of` gives the key again.
    """
    name, *texts = key.split(" ")
    try:
        dtype: Any = getattr(torch, name)
        shapes = [tuple(map(int, text.split("x"))) for text in texts]
        case = read(dtype, *shapes)
        understood = len(shapes[0]) == 4 and key_of(case) == key
    except (AttributeError, IndexError, TypeError, ValueError):
        understood = False
    if not understood:
        raise BackendError(
            f"{key!r} is no shape key that the sweep of this operation knows: let `case_of` in "
            f"{read.__module__} read what the operation in lgcnet_fast/ops looks up"
        )
    return case
