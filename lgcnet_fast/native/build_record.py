"""What the build wrote down about itself, since installers hide what it prints."""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).with_name("build_record.json")


def read() -> dict[str, str]:
    """Keys: `built` (yes or no), `reason`, `architectures`, `nvcc`; empty without a record."""
    try:
        return json.loads(PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def reason() -> str:
    """Why the extension was not compiled."""
    return read().get("reason") or "the package was never installed, only imported from its folder"
