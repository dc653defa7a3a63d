"""Live progress of a stage: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BEFORE_FIRST_LINE = 1.0
SECONDS_BETWEEN_LINES = 10.0


class StageProgress:
    """Counts the steps of one stage; `show` adds the newest values behind rate and ETA."""

    def __init__(self, stage: str, steps: int, done: int = 0, enabled: bool = True) -> None:
        self.stage, self.steps, self.done = stage, steps, done
        self._console = Console(quiet=not enabled, highlight=False)
        self._started, self._first = time.monotonic(), done
        self._next_line = self._started + SECONDS_BEFORE_FIRST_LINE
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}  ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(stage, total=steps, completed=done, rate="", values="")

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, epoch: str = "", **values: float | None) -> None:
        """`done` steps are behind us, in `epoch` such as 3/150; None values are left out."""
        self.done = done
        rate = (done - self._first) / max(time.monotonic() - self._started, 1e-9)
        shown = [f"epoch {epoch}"] if epoch else []
        shown += [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
        text = "  ".join(shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.2f}/s", values=text)
        elif time.monotonic() >= self._next_line or done == self.steps:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            eta = _duration((self.steps - done) / rate) if rate else "?"
            self._console.print(
                f"{self.stage}: {done}/{self.steps}  {rate:.2f}/s  ETA {eta}  {text}",
                soft_wrap=True,
                markup=False,
            )


class CountProgress:
    """Called with (done, of all) while files are packed; silent if nothing needs packing."""

    def __init__(self, title: str, enabled: bool = True) -> None:
        self._title, self._enabled = title, enabled
        self._progress: StageProgress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = StageProgress(self._title, total, enabled=self._enabled)
            self._progress.__enter__()
        self._progress.show(done)
        if done == total:
            self._progress.__exit__(None, None, None)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
