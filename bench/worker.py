"""A process that a measurement asks for things: `python -m bench.worker bench.MODULE:CLASS`.

Requests and replies are lines of JSON on the standard streams; whatever else is printed goes to
the error stream. A process of its own has memory, caches and a start of its own, and can be ended.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from contextlib import suppress


def main() -> None:
    with suppress(BrokenPipeError):  # Whoever asked has gone.
        _serve()


def _serve() -> None:
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        module, _, name = sys.argv[1].partition(":")
        target = getattr(importlib.import_module(module), name)()
        for line in sys.stdin:
            request = json.loads(line)
            channel.write(json.dumps(_reply(target, request)) + "\n")


def _reply(target: object, request: dict) -> dict:
    try:
        return {"result": getattr(target, request["call"])(**request["arguments"])}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


if __name__ == "__main__":
    main()
