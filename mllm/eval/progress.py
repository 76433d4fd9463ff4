"""How far is a run, and when will it be done?"""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_SECONDS = 30.0


class Progress:
    """A bar with rate and remaining time on a terminal; elsewhere a line every half minute. Answers already there at
    the start do not count towards the rate."""

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True):
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self._started = self._printed = time.monotonic()
        self._fresh = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, rate="")
        return self

    def advance(self) -> None:
        """One more answer."""
        self.done += 1
        self._fresh += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=f"{self.rate():.1f}/s")
        elif self.shown and time.monotonic() - self._printed > _LINE_SECONDS:
            self._printed = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def reach(self, total: int) -> None:
        """So many questions are taken by all processes together: the bar stands there at least."""
        self.done = max(self.done, min(total, self.total))
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def rate(self) -> float:
        """Answers per second since the start."""
        return self._fresh / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """``title 120/2500, 8.3/s, 4.8 min left``."""
        left = (self.total - self.done) / self.rate() if self._fresh else float("nan")
        return f"{self.title} {self.done}/{self.total}, {self.rate():.1f}/s, {left / 60:.1f} min left"

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()
