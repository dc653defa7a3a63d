"""Where tables and messages go."""

from __future__ import annotations

from rich.console import Console

WIDTH_OF_A_PIPE = 120


def console() -> Console:
    """Standard output, without reading colours and links into file names.

    A pipe has no width of its own; tables must not break there at 80 columns.
    """
    found = Console(highlight=False, markup=False, soft_wrap=False)
    if not found.is_terminal:
        found.width = WIDTH_OF_A_PIPE
    return found
