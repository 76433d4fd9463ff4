"""What is a metric here, and what does it return?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Score:
    """What one rule made of one prediction.

    value: 0 to 1 (or the metric's own unit); None when no answer could be read from the prediction: it counts as 0 in
    every aggregate and is reported as unparsed. extracted: the answer as compared. rule: which branch of the rule
    decided. parts: further numbers of this sample (precision, intersection, …).
    """

    value: float | None
    extracted: str = ""
    rule: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """One scored sample as an aggregate sees it. meta: the task's fields of the sample (options, category, pair …)."""

    id: str
    score: Score
    target: Any
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The score with an unparsed prediction counted as 0."""
        return 0.0 if self.score.value is None else self.score.value


class Metric:
    """A named, versioned scoring rule. A change that can change any number changes `version`."""

    name: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    protocol: ClassVar[str] = ""
    """One sentence: whose rule this is and what is peculiar about it."""
    binary: ClassVar[bool] = True
    """Every score is 0 or 1: Wilson intervals and McNemar's test apply."""
    is_mean: ClassVar[bool] = True
    """The headline is ``scale`` × the mean of the scores, so closed-form standard errors apply; otherwise bootstrap."""
    scale: ClassVar[float] = 100.0
    """What a mean is multiplied by for display."""
    unit: ClassVar[str] = "%"
    group_key: ClassVar[str | None] = None
    """Key of ``meta`` whose samples the score joins (a picture, a question); a bootstrap draws whole groups."""
    reads_text: ClassVar[bool] = True
    """False: predictions are pictures, not replies."""
    chooses: ClassVar[bool] = False
    """Every question has options, of which the answer is one: a row without any cannot be used."""
    example: ClassVar[tuple[Any, Mapping[str, Any]] | None] = None
    """A (target, meta) that the rule takes, for `mllm check`, where it takes none of the usual ones."""
    options: Mapping[str, Any] = {}

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        """Score one prediction.

        Args:
            prediction: what the model answered.
            target: the sample's target, as the task's data have it.
            meta: the task's fields of the sample (options, category, pair …).

        Returns:
            The score from 0 to 1 (value None where nothing could be read from the answer), and what it was taken from.

        Raises:
            DataError: the rule cannot use the target.
        """
        raise NotImplementedError

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:
        """Totals over the samples.

        Args:
            items: the scored samples, in the order of the task.

        Returns:
            ``"score"`` is the headline (NaN without samples); where there are several categories, each one's mean and ``"macro"``, the mean
            of those. In the metric's `unit`.
        """
        categories = group_means(items, "category", self.scale)
        several = {"macro": mean(list(categories.values())), **categories} if len(categories) > 1 else {}
        return {"score": self.scale * mean(item.value for item in items)} | several

    def counts(self, item: Scored) -> tuple[str, tuple[float, ...]] | None:
        """What a sample adds to the headline, for a total that is no mean: with it a bootstrap of a million answers adds up numbers,
        without it every draw calls `aggregate`.

        Args:
            item: one scored sample.

        Returns:
            (the part whose counts stand apart, the counts: equally many for every sample); None where the metric has no such form.
        """
        return None

    def joined(self, sums: np.ndarray) -> np.ndarray:
        """What whole groups of `group_key` add to the headline.

        Args:
            sums: ``(groups, k)``, each group's sums of `counts`.

        Returns:
            ``(groups, j)``, here the sums themselves.
        """
        return sums

    def headline(self, parts: np.ndarray) -> float:
        """The headline that `aggregate` gives.

        Args:
            parts: ``(parts, j)``, each part's sums of `joined`; a row of zeros is a part that does not occur.

        Returns:
            It, in the metric's `unit`.
        """
        raise NotImplementedError

    @cached_property
    def label(self) -> str:
        """Name, options and version, as printed beside a number."""
        options = ",".join(f"{k}={v}" for k, v in sorted(self.options.items()))
        return f"{self.name}{f'({options})' if options else ''} v{self.version}"


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean.

    Args:
        values: any number of them, walked through once.

    Returns:
        The mean; NaN when there is none.
    """
    whole = Mean()
    for value in values:
        whole.append(value)
    return whole.value


class Mean:
    """An arithmetic mean told value by value: a million values fit in no list."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def append(self, value: float) -> None:
        """One more value.

        Args:
            value: it, added to the sum.
        """
        self.count, self.total = self.count + 1, self.total + value

    @property
    def value(self) -> float:
        """The mean so far; NaN of none."""
        return self.total / self.count if self.count else float("nan")


def means_by(pairs: Iterable[tuple[str, float]], scale: float) -> dict[str, float]:
    """Means by name.

    Args:
        pairs: (name, value), walked through once.
        scale: what every mean is multiplied by.

    Returns:
        Name → ``scale`` × mean, in order of first appearance.
    """
    means: dict[str, Mean] = {}
    for name, value in pairs:
        means.setdefault(name, Mean()).append(value)
    return {name: scale * each.value for name, each in means.items()}


def group_means(items: Iterable[Scored], key: str, scale: float) -> dict[str, float]:
    """Means by group.

    Args:
        items: the scored samples.
        key: field of ``meta`` that names a sample's group; samples without it are left out.
        scale: what every mean is multiplied by.

    Returns:
        Group → ``scale`` × mean, in order of first appearance.
    """
    return means_by(((str(name), item.value) for item in items if (name := item.meta.get(key)) is not None), scale)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Element by element, 0 where the denominator is.

    Args:
        above: numerators.
        below: denominators, of the same shape.

    Returns:
        ``above / below``.
    """
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)
