"""Where the CUDA sources are, and what identifies their state.

The build reads this file on its own, so it imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "csrc"
"""CUDA C++ sources: a part of the installed package, since they can be compiled at run time."""

INSTANCES = Path(__file__).resolve().with_name("instances.py")


def digest() -> str:
    """16 hexadecimal digits that change with any source file or with the list of kernels.

    Compilers that cache by the text of the main file alone get it as a definition.
    """
    hasher = hashlib.sha256()
    for path in [*sorted(FOLDER.glob("*.*")), INSTANCES]:
        content = path.read_bytes()
        hasher.update(f"{path.name} {len(content)}\n".encode())
        hasher.update(content)
    return hasher.hexdigest()[:16]
