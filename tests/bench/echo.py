"""Something for a worker process to serve."""

from __future__ import annotations

import os
import time


class Echo:
    def repeat(self, text: str) -> str:
        print("printed, not replied")
        return text

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self, reason: str) -> None:
        raise ValueError(reason)

    def leave(self, code: int) -> None:
        os._exit(code)
