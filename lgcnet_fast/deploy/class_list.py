"""Class sets as run folders and engine files store them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lgcnet_fast.data.classes import IGNORE, ClassSet

Byte = Annotated[int, Field(strict=True, ge=0, le=255)]
Id = Annotated[int, Field(strict=True, ge=0)]


class ClassList(BaseModel):
    """One entry a class in each list, in train-id order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    names: Annotated[tuple[str, ...], Field(min_length=1, max_length=IGNORE)]
    colours: tuple[tuple[Byte, Byte, Byte], ...]
    output_ids: tuple[Id, ...]

    @model_validator(mode="after")
    def _one_entry_a_class(self) -> ClassList:
        if not len(self.names) == len(self.colours) == len(self.output_ids):
            raise ValueError("names, colours and output_ids must be equally long")
        return self

    @classmethod
    def of(cls, classes: ClassSet) -> ClassList:
        return cls(
            name=classes.name,
            names=classes.names,
            colours=tuple(map(tuple, classes.colours.tolist())),
            output_ids=classes.output_ids,
        )

    def class_set(self) -> ClassSet:
        colours = np.array(self.colours, np.uint8)
        return ClassSet(self.name, self.names, colours, output_ids=self.output_ids)
