"""What does the user see while a stage trains?"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""How often a count that no step is made of (features) is told where there is no terminal."""


class StageDisplay:
    """A progress bar with stage, time left and loss; plain lines where there is no terminal. Silent on other
    processes."""

    def __init__(self, stage: str, *, active: bool, console: Console | None = None):
        self.active, self.stage, self.total = active, stage, 0
        self.console = console or Console(stderr=not sys.stdout.isatty() and sys.stderr.isatty())
        self.lines_every = 1
        self.bar: Progress | None = None
        self.counted: str | None = None
        self._began = self._told = (0, 0.0)

    def start(self, total: int, done: int = 0, *, what: str | None = None) -> None:
        """Show the bar of ``total`` steps, ``done`` of them already. what: its name, when it is not the stage's."""
        self.total, self.lines_every = total, max(1, total // 20)
        self.counted = what
        self._began = self._told = (done, time.monotonic())
        if self.active and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(what or self.stage, total=total, completed=done, figures="")

    def print(self, what: Any) -> None:
        if self.active:
            (self.bar.console if self.bar else self.console).print(what, soft_wrap=isinstance(what, str))

    def update(self, step: int, record: dict[str, Any] | None) -> None:
        """step: steps done; record: the step's numbers when it was logged."""
        if not self.active:
            return
        if self.bar is not None:
            if record is None:
                self.bar.update(self.task, completed=step)
            else:
                self.bar.update(self.task, completed=step, figures=figures(record))
        elif record is not None and (step % self.lines_every == 0 or step in (1, self.total)):
            self.console.print(f"{self.stage} {step}/{self.total}  {figures(record)}", highlight=False, soft_wrap=True)
        elif record is None and self.counted and time.monotonic() - self._told[1] > LINE_SECONDS:
            self._told = (step, time.monotonic())
            rate = (step - self._began[0]) / (self._told[1] - self._began[1])
            left = f", {(self.total - step) / rate / 60:.1f} min left" if rate else ""
            self.console.print(f"{self.counted} {step:,}/{self.total:,}, {rate:.1f}/s{left}", highlight=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


_TOLD_FIRST = {"reward": "reward", "rewards/margins": "margin"}


def figures(record: dict[str, Any]) -> str:
    """``loss 1.234  |g| 0.56  lr 1e-03  1,234 tok/s  MFU 45.1 % (47.3 % with encoders)  data 0.4 %``; first, where answers were rewarded or
    preferred, by how much: a policy's loss says nothing of it."""
    rate = max(record["lr"].values(), default=0.0)
    parts = [f"{name} {record[key]:.3f}" for key, name in _TOLD_FIRST.items() if key in record]
    parts += [f"loss {record['loss']:.4f}", f"|g| {record['grad_norm']:.2f}", f"lr {rate:.1e}"]
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if record.get("mfu"):
        parts.append(f"MFU {record['mfu']['language_model']:.1%} ({record['mfu']['total']:.1%} with encoders)")
    if record.get("data_wait") is not None:
        parts.append(f"data {record['data_wait']:.1%}")
    return "  ".join(parts)
