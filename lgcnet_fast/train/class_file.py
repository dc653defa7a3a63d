"""classes.json: the classes that a run was trained on, so that it predicts without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lgcnet_fast.config import explain
from lgcnet_fast.data.classes import IGNORE, ClassSet
from lgcnet_fast.errors import RunError

Byte = Annotated[int, Field(strict=True, ge=0, le=255)]
Id = Annotated[int, Field(strict=True, ge=0)]


class ClassFile(BaseModel):
    """One entry a class in each list, in train-id order."""

    model_config = ConfigDict(extra="forbid")

    name: str
    names: Annotated[list[str], Field(min_length=1, max_length=IGNORE)]
    colours: list[tuple[Byte, Byte, Byte]]
    output_ids: list[Id]

    @model_validator(mode="after")
    def _one_entry_a_class(self) -> ClassFile:
        if not len(self.names) == len(self.colours) == len(self.output_ids):
            raise ValueError("names, colours and output_ids must be equally long")
        return self


def class_values(classes: ClassSet) -> dict[str, Any]:
    """What classes.json holds."""
    return {
        "name": classes.name,
        "names": list(classes.names),
        "colours": classes.colours.tolist(),
        "output_ids": list(classes.output_ids),
    }


def read_classes(path: Path) -> ClassSet:
    """Raises `RunError` if the file cannot be read or does not fit together."""
    try:
        stored = ClassFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        remedy = "delete it, and it is written again from the data set"
        raise RunError(f"{path}: damaged: {explain(error, ClassFile)}; {remedy}") from None
    colours = np.array(stored.colours, np.uint8)
    return ClassSet(stored.name, tuple(stored.names), colours, output_ids=tuple(stored.output_ids))
