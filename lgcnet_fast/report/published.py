"""Published accuracy and speed on Cityscapes test, as data.

Source: Table IV of the LGCNet paper. It lists other methods' speeds as their papers give them or as
measured again, without the device of each; those of LGCNet are from one Titan Xp. None of them can
be compared with what another GPU measures, except for its order.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

SOURCE = "LGCNet, Table IV (Cityscapes test)"
_FILE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class PublishedRow:
    method: str
    input: str
    """Height x width of the network's input, as the source writes it."""
    miou: float
    """Percent."""
    fps: float
    device: str
    """`not recorded` where the source does not tell."""
    note: str


def published_rows() -> tuple[PublishedRow, ...]:
    with _FILE.open(encoding="utf-8", newline="") as file:
        return tuple(
            PublishedRow(
                row["method"],
                row["input"],
                float(row["miou"]),
                float(row["fps"]),
                row["device"],
                row["note"],
            )
            for row in csv.DictReader(file)
        )
