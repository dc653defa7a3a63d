"""Genotypes: frozen descriptions of one network of a search space, as versioned JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Genotype(BaseModel):
    """What every space's genotype has; a space adds its own fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    space: str
