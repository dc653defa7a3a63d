"""Starting worker processes, asking them with a time limit, and ending them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class WorkerFailed(Exception):
    """The reason is the message."""


class Worker:
    """`target` is `bench.MODULE:CLASS`, whose methods can be called by name."""

    def __init__(self, target: str, environment: Mapping[str, str] | None = None) -> None:
        self.started = time.time()
        # A process group of its own: compilers that it starts end with it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", target],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, call: str, within: float, **arguments: Any) -> Any:
        """The result; raises `WorkerFailed` if there is none within the time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=max(within, 0.1))
        except (queue.Empty, OSError):
            self.end()
            raise WorkerFailed(f"no answer in {within:.0f} s") from None
        if not line:
            self.end()
            raise WorkerFailed(f"the process ended with exit code {self._process.returncode}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply["result"]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """With everything that it has started."""
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")


class Workers(AbstractContextManager["Workers"]):
    """One worker at a time: in place of one that had to be ended comes a new one."""

    def __init__(self, target: str, environment: Mapping[str, str] | None = None) -> None:
        self._target, self._environment = target, environment
        self._worker = Worker(target, environment)

    @property
    def started(self) -> float:
        """When the present worker was, by `time.time`."""
        return self._worker.started

    def ask(self, call: str, within: float, **arguments: Any) -> Any:
        """As `Worker.ask`."""
        if not self._worker.alive:
            self._worker = Worker(self._target, self._environment)
        return self._worker.ask(call, within, **arguments)

    def __exit__(self, *exception: object) -> None:
        self._worker.end()
