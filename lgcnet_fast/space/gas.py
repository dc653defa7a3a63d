"""The GAS search space: LGCNet's cells and graph-guided module in front of a fixed ASPP head."""

from __future__ import annotations

from typing import ClassVar, Literal

from lgcnet_fast.space.layout import Head
from lgcnet_fast.space.lgcnet import LGCNet, LGCNetOptions
from lgcnet_fast.space.lgcnet_genotype import LGCNetGenotype


class GASOptions(LGCNetOptions):
    head: Head = "aspp"


class GASGenotype(LGCNetGenotype):
    space: Literal["gas"] = "gas"  # type: ignore[assignment]
    head: Head = "aspp"


class GAS(LGCNet):
    name = "gas"
    Options = GASOptions
    Genotype: ClassVar[type[LGCNetGenotype]] = GASGenotype
