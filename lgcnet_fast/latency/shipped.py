"""Tables of devices that come with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from lgcnet_fast.errors import TableError
from lgcnet_fast.latency.providers import ROOFLINE
from lgcnet_fast.latency.table import LookupTable, load_table

SUFFIX = ".json"
FOLDER = Path(__file__).with_name("tables")


def shipped_tables() -> tuple[str, ...]:
    """Names that `latency.table` takes besides files and the roofline."""
    return tuple(sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}")))


def find_table(name: str) -> LookupTable:
    """The shipped table of that name, or the file at that path. Raises `TableError`."""
    if name in shipped_tables():
        return load_table(FOLDER / f"{name}{SUFFIX}")
    if name.endswith(SUFFIX) or Path(name).exists():
        return load_table(Path(name))
    known = (*shipped_tables(), ROOFLINE)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    raise TableError(
        f"latency table {name!r}: neither a file ending in {SUFFIX} nor one that comes with the "
        f"package; did you mean {near!r}? One of {', '.join(known)}"
    )
