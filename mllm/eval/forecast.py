"""How much is a run about to ask, how long will that take and what will it cost, said before it begins and once answers are measured?"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from mllm.eval.asking import times_asked
from mllm.eval.task import TaskSpec

FIRST = 32
"""So many answers are measured before the time is told, where no earlier run tells it."""


def say(text: str) -> None:
    """To standard error, where the progress stands."""
    print(text, file=sys.stderr, flush=True)


class Forecast:
    """Told before a run what earlier runs lead to expect, and after its first answers what these do. blind: whether questions are asked
    with their controls, too (`times_asked`); rates: seconds of one process per answer of tasks that ran before; price: of an hour of one
    process; local: tasks whose files lie in a folder, which may hold fewer questions than the benchmark has."""

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        *,
        limit: int | None = None,
        blind: bool = False,
        processes: int = 1,
        price: float | None = None,
        rates: Mapping[str, float] | None = None,
        local: Collection[str] = (),
        tell: Callable[[str], None] = say,
    ):
        self._declared = {} if limit is not None else {spec.name: spec.size for spec in specs}
        self._sizes = {spec.name: _fewer(None if spec.name in local else spec.size, limit) for spec in specs}
        self._at_most = "at most " if limit is not None and any(name in local for name in self._sizes) else ""
        self._ways = {spec.name: times_asked(spec, blind) for spec in specs}
        self._processes, self._price, self._tell = processes, price, tell
        self._rates = {name: rate for name, rate in (rates or {}).items() if name in self._sizes}
        self._started, self._answered, self._done = 0.0, 0, 0
        self._announced = bool(self._rates)

    def announce(self) -> None:
        """The line before a run begins."""
        rate = sum(self._rates.values()) / len(self._rates) if self._rates else None
        text = f"{self._extent()}; "
        if rate is None:
            self._tell(f"{text}how long that takes is told after the first {FIRST} answers (--earlier FOLDER: before)")
            return
        seconds = sum(
            self._ways[name] * (size or 0) * self._rates.get(name, rate) for name, size in self._sizes.items()
        )
        self._tell(f"{text}{self._cost(seconds / self._processes)}, by earlier runs of {len(self._rates)} of them")

    def begin(self, task: str, count: int, done: int) -> None:
        """A task begins. count: how many questions its files really hold; done: of these answered already."""
        declared = self._declared.pop(task, None)  # told once, not with each control
        if declared is not None and count != declared:
            self._tell(f"{task}: {count:,} questions, where the whole benchmark has {declared:,}")
        self._sizes[task], self._done = count, self._done + done
        self._started = self._started or time.monotonic()

    def advance(self) -> None:
        """One more answer of this process."""
        self._answered += 1
        if self._announced or self._answered < FIRST:
            return
        self._announced = True
        each = (time.monotonic() - self._started) / self._answered
        left = self._count() - self._done - self._answered * self._processes
        if left > 0:
            cost = self._cost(each * left / self._processes)
            unknown = sum(size is None for size in self._sizes.values())
            more = f", and {unknown} task{'s' if unknown > 1 else ''} of unknown size" if unknown else ""
            self._tell(
                f"{each:.2g} s an answer, measured on the first {self._answered}; {cost} for the {left:,} left{more}"
            )

    def _count(self) -> int:
        """Answers of all tasks whose size is known."""
        return sum(self._ways[name] * (size or 0) for name, size in self._sizes.items())

    def _extent(self) -> str:
        known = [size for size in self._sizes.values() if size is not None]
        count, unknown = self._count(), len(self._sizes) - len(known)
        tasks = f"{len(self._sizes)} task{'s' if len(self._sizes) > 1 else ''}"
        if not known:
            return f"{tasks}, all questions of their files"
        return f"{tasks}, {self._at_most}{count:,} questions{f' and all of the files of {unknown}' if unknown else ''}"

    def _cost(self, seconds: float) -> str:
        minutes = seconds / 60
        duration = (
            f"about {minutes:.0f} min"
            if 1 <= minutes < 120
            else f"about {minutes / 60:.1f} h"
            if minutes >= 1
            else "under a minute"
        )
        price = (
            ""
            if self._price is None
            else f", {seconds / 3600 * self._price * self._processes:.2f} at {self._price:g} an hour"
        )
        return f"{duration}{f' in {self._processes} processes' if self._processes > 1 else ''}{price}"


def _fewer(size: int | None, limit: int | None) -> int | None:
    return limit if size is None else size if limit is None else min(size, limit)
