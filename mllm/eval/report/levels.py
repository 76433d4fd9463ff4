"""Which samples are hard, by what other runs made of them?"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

from mllm.errors import ConfigError
from mllm.eval.ids import Places
from mllm.eval.predictions import iterate_predictions
from mllm.eval.spool import Names


class Levels:
    """How many of some runs are right on each sample: some 40 bytes a sample."""

    def __init__(self) -> None:
        self._names, self._places = Names(), Places()
        self._seen, self._right = array("H"), array("H")
        self._runs = 0

    def add(self, path: Path) -> None:
        """One more run's answers, by their headline."""
        self._runs += 1
        new = Names()
        right = array("H")
        for row in iterate_predictions(path):
            entry = next(iter(row.get("scores", {}).values()), {})
            verdict = (entry.get("value") or 0.0) >= 0.5
            if (place := self._place(row["id"])) is None:
                new.append(row["id"])
                right.append(verdict)
            else:
                self._seen[place] += 1
                self._right[place] += verdict
        for name in new:
            self._places.add(name, len(self._names))
            self._names.append(name)
        self._seen.extend(array("H", [1]) * len(new))
        self._right.extend(right)

    def _place(self, name: str) -> int | None:
        return next((place for place in self._places.of(name) if self._names[place] == name), None)

    def get(self, name: str) -> str | None:
        """``all of 3 other runs right``, ``some …`` or ``none …``; None for a sample that some run did not answer."""
        place = self._place(name)
        if place is None or self._seen[place] < self._runs:
            return None
        word = "all" if self._right[place] == self._runs else "some" if self._right[place] else "none"
        return f"{word} of {self._runs} other run{'s' if self._runs > 1 else ''} right"


def levels_by_runs(name: str, folders: Sequence[str | Path]) -> Levels | None:
    """What the prediction files of this name in other runs' folders say of each sample; None without folders. Raises `ConfigError` for
    a folder that has none."""
    levels = Levels()
    for folder in map(Path, folders):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: holds no {name}, so it cannot tell which of its samples are hard")
        levels.add(folder / name)
    return levels if folders else None
