"""The error of a file that cannot be used."""

from __future__ import annotations

from pathlib import Path

from lgcnet_fast.errors import DataError


class FileFault(DataError):
    """Something is wrong with one file; `file`, `fault` and `remedy` make the message."""

    def __init__(self, file: Path | str, fault: str, remedy: str) -> None:
        super().__init__(f"{file}: {fault}; {remedy}")
        self.file = str(file)
        self.fault = fault
        self.remedy = remedy
