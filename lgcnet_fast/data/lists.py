"""List files: one image, or one image and its label, a line."""

from __future__ import annotations

from pathlib import Path

from lgcnet_fast.data.faults import FileFault


def read_list(path: Path, columns: int) -> list[list[str]]:
    """The lines of a list file, split at white space; empty lines are skipped.

    Raises `DataError` naming the file and line (wrong number of columns, not text, empty list).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileFault(path, "no such list file", "create it or correct data.root") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        remedy = "save it as UTF-8 text"
        raise FileFault(path, f"cannot be read ({type(error).__name__})", remedy) from None
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        row = line.split()
        if row and (len(row) != columns or "\0" in line):
            wanted = "IMAGE LABEL" if columns == 2 else "NAME"
            raise FileFault(path, f"line {number} is {line[:80]!r}", f"write it as {wanted}")
        if row:
            rows.append(row)
    if not rows:
        raise FileFault(path, "no entry", "list at least one image")
    return rows


def check_unique(path: Path, stems: list[str]) -> None:
    """Raises `DataError` when a list file names one image twice."""
    seen: set[str] = set()
    for stem in stems:
        if stem in seen:
            raise FileFault(path, f"{stem!r} is listed twice", "remove one of the lines")
        seen.add(stem)
