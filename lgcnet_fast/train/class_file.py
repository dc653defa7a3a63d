"""classes.json: the classes that a run was trained on, so that it predicts without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lgcnet_fast.config import explain
from lgcnet_fast.data.classes import ClassSet
from lgcnet_fast.deploy.class_list import ClassList
from lgcnet_fast.errors import RunError


def class_values(classes: ClassSet) -> dict[str, Any]:
    """What classes.json holds."""
    return ClassList.of(classes).model_dump(mode="json")


def read_classes(path: Path) -> ClassSet:
    """Raises `RunError` if the file cannot be read or does not fit together."""
    try:
        return ClassList.model_validate_json(path.read_bytes()).class_set()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        remedy = "delete it, and it is written again from the data set"
        raise RunError(f"{path}: damaged: {explain(error, ClassList)}; {remedy}") from None
