"""What do scored predictions add up to, under each metric, and how sure is it?"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from mllm.errors import DataError
from mllm.eval.metrics import Metric, Scored
from mllm.eval.report.columns import Categories, Clusters, ScoredItems, Sureness, Taken, scored
from mllm.eval.report.facts import AnswerFacts, FactSums
from mllm.eval.report.statistics import Estimate, bootstrap_estimate, mean_estimate, num_distinct, wilson_interval
from mllm.eval.report.tallies import bootstrap_tallies

Row = dict[str, Any]
_DRAWS = 200
HELD = 50_000
"""So many samples are in memory as objects while a bootstrap draws them again and again."""
_NAMED = 5
_UNUSABLE, _FAILED = "unusable", "generation failed, counted as wrong"


@dataclass
class MetricResult:
    """One metric over one task, in display units. details: everything the metric's aggregate gives."""

    label: str
    protocol: str
    unit: str
    scale: float
    value: float
    standard_error: float
    low: float
    high: float
    method: str
    num_scored: int
    num_unparsed: int
    num_clusters: int | None
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CategoryResult:
    """The headline over the samples of one category, in display units."""

    name: str
    value: float
    low: float
    high: float
    num_samples: int


DIFFICULTY = ("the benchmark's own level", "how many other runs are right", "the model's own probability")
"""By what samples are called difficult, where it is known."""


class SampleLevels(Protocol):
    """A level of difficulty by sample id, a mapping or what answers like one."""

    def get(self, name: str, /) -> str | None: ...


@dataclass(frozen=True)
class DifficultyResult:
    """The headline over the samples of one level of difficulty, in display units. by: one of `DIFFICULTY`."""

    by: str
    name: str
    value: float
    low: float
    high: float
    num_samples: int


@dataclass
class TaskResult:
    """One task: metrics in order (the first is the headline), what was counted, and where the predictions are."""

    task: str
    version: int
    metrics: list[MetricResult]
    num_samples: int
    num_unusable: int
    num_errors: int
    problems: list[str]
    data_hash: str
    prompt_hash: str
    header: dict[str, Any]
    disagreements: dict[str, int]
    facts: AnswerFacts = field(default_factory=AnswerFacts)
    categories: list[CategoryResult] = field(default_factory=list)
    """The headline by category, the largest first; empty where the task has none."""
    difficulty: list[DifficultyResult] = field(default_factory=list)
    """The headline by difficulty, in every way in which it is known."""
    path: str = ""
    blind: TaskResult | None = None
    """Every picture blanked."""
    shuffled: TaskResult | None = None
    """Every question with another one's pictures."""
    prior: TaskResult | None = None
    """The commonest answer of the question's kind, always."""
    frames: dict[str, TaskResult] = field(default_factory=dict)
    """Videos with their frames shuffled, reversed, or one of them in every place."""

    @property
    def score(self) -> float:
        """Headline over its scale: 0 to 1 for a percentage."""
        return self.metrics[0].value / self.metrics[0].scale

    @property
    def blind_score(self) -> float:
        """The same without seeing. Raises `DataError` when no blind run was made."""
        if self.blind is None:
            raise DataError(f"{self.task}: no blind run was made; ask for one with blind=True")
        return self.blind.score

    @property
    def floor(self) -> tuple[float, str]:
        """(the best headline that needs no look at the right picture, how it was got): what seeing is measured against.
        Raises `DataError` when no blind run was made."""
        ways = {"blank": self.blind, "shuffled": self.shuffled, "prior": self.prior}
        scores = {name: result.score for name, result in ways.items() if result is not None}
        found = {name: score for name, score in scores.items() if score == score}
        if not found:
            raise DataError(f"{self.task}: no blind run was made; ask for one with blind=True")
        name = max(found, key=lambda way: found[way])
        return found[name], name

    @property
    def protocol(self) -> str:
        """What must be equal for two numbers to be comparable."""
        limited = "" if not self.header.get("limited") else " (part of the benchmark)"
        return (
            f"{self.task} v{self.version} · {self.metrics[0].label} · prompt {self.prompt_hash} · "
            f"data {self.data_hash} · n={self.metrics[0].num_scored}{limited}"
        )


def score_row(metrics: Sequence[Metric], output: str, target: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of one prediction by metric label, as a prediction line holds them. A target that a metric cannot use is
    an ``error`` of that metric, not a score."""
    scores: dict[str, Any] = {}
    for metric in metrics:
        try:
            result = metric.score(output, target, meta)
        except DataError as error:
            scores[metric.label] = {"error": str(error)}
            continue
        scores[metric.label] = {"value": result.value, "extracted": result.extracted, "rule": result.rule}
        if result.parts:
            scores[metric.label]["parts"] = dict(result.parts)
    return scores


def score_fields(row: Row, metrics: Sequence[Metric]) -> dict[str, Any]:
    """``scores`` and the headline's ``extracted`` of one row. Nothing is scored without a target; a failed generation
    is wrong under every metric."""
    if row["target"] is None or row.get("unusable"):
        return {"extracted": "", "scores": {}}
    if row.get("error"):
        failed = {"value": None, "extracted": "", "rule": "generation failed"}
        return {"extracted": "", "scores": {metric.label: dict(failed) for metric in metrics}}
    scores = score_row(metrics, row["output"], row["target"], row["meta"])
    return {"extracted": scores[metrics[0].label].get("extracted", ""), "scores": scores}


def statistic_of(metric: Metric, items: Sequence[Scored]) -> Callable[[np.ndarray], float]:
    """The metric's headline as a function of sample positions. A group that a bootstrap draws twice stays two
    groups."""

    def statistic(positions: np.ndarray) -> float:
        if len(positions) == len(items) and (np.diff(positions) > 0).all():
            return metric.aggregate(items)["score"]  # all of them, as they come: a million are not there at once
        seen: Counter[int] = Counter()
        chosen = []
        for position in positions.tolist():
            item = items[position]
            seen[position] += 1
            if metric.group_key is not None and seen[position] > 1:
                name = f"{item.meta.get(metric.group_key, item.id)}#{seen[position]}"
                item = replace(item, meta={**item.meta, metric.group_key: name})
            chosen.append(item)
        return metric.aggregate(chosen)["score"]

    return statistic


def estimate(metric: Metric, items: ScoredItems | Taken, clusters: np.ndarray, *, draws: int = _DRAWS) -> Estimate:
    """Headline with its uncertainty, in display units."""
    if not metric.is_mean and (drawn := items.drawn(clusters)) is not None:
        return _at_the_edge(bootstrap_tallies(drawn, repeats=draws), metric, clusters)
    if not metric.is_mean:
        chosen = list(items) if len(items) <= HELD else items
        return _at_the_edge(bootstrap_estimate(statistic_of(metric, chosen), clusters, repeats=draws), metric, clusters)
    result = mean_estimate(items.values, clusters=clusters, binary=metric.binary)
    scaled = {name: metric.scale * getattr(result, name) for name in ("value", "standard_error", "low", "high")}
    return replace(result, **scaled)


def _at_the_edge(result: Estimate, metric: Metric, clusters: np.ndarray) -> Estimate:
    """No draw differs from a percentage of 0 or 100, so a bootstrap's interval there is a point; Wilson's over the groups is
    not."""
    if metric.unit != "%" or result.value not in (0.0, 100.0) or not len(clusters):
        return result
    groups = num_distinct(clusters)
    low, high = wilson_interval(result.value / 100 * groups, groups)
    return replace(
        result, low=100 * low, high=100 * high, method=f"Wilson over {groups} groups (every draw is the same)"
    )


def metric_result(metric: Metric, rows: Iterable[Row]) -> MetricResult:
    """One metric's total over prediction rows."""
    total = _Total(metric)
    for row in rows:
        total.append(row)
    return total.result()[0]


class _Total:
    """A metric's total and, with ``parts``, its totals by category and by difficulty, told row by row. others: what other runs made of
    each sample."""

    def __init__(self, metric: Metric, *, parts: bool = False, others: SampleLevels | None = None):
        self._metric, self._items, self._clusters = metric, ScoredItems(metric), Clusters(metric)
        self._sureness = Sureness(metric) if parts else None
        ways = {
            "category": Categories(metric),
            DIFFICULTY[0]: Categories(metric, lambda row: row["meta"].get("difficulty")),
            DIFFICULTY[1]: Categories(metric, lambda row: None if others is None else others.get(row["id"])),
        }
        self._split = ways if parts else {}

    def append(self, row: Row) -> None:
        """One more row, of which the metric may have scored nothing."""
        facts = scored(row, self._metric)
        if facts is None:
            return
        self._items.append(row["id"], facts)
        self._clusters.append(row)
        for part in self._split.values():
            part.append(row)
        if self._sureness is not None:
            self._sureness.append(row)

    def result(self) -> tuple[MetricResult, list[CategoryResult], list[DifficultyResult]]:
        """(the total, the headline by category, the headline by difficulty)."""
        metric, items, clusters = self._metric, self._items, self._clusters.codes()
        details = metric.aggregate(items)
        sure = estimate(metric, items, clusters)
        result = MetricResult(
            metric.label, metric.protocol, metric.unit, metric.scale, details["score"], sure.standard_error, sure.low,
            sure.high, sure.method, len(items), items.num_unparsed, sure.num_clusters, details,
        )  # fmt: skip
        if self._sureness is None:
            return result, [], []

        def each(places: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float, float, float, int]]:
            for name, positions in places.items() if len(places) > 1 else ():
                part = estimate(metric, Taken(items, positions), clusters[positions])
                yield name, part.value, part.low, part.high, len(positions)

        levels = {by: dict(sorted(self._split[by].positions().items())) for by in DIFFICULTY[:2]}
        levels[DIFFICULTY[2]] = self._sureness.positions(clusters)
        return (
            result,
            [CategoryResult(*totals) for totals in each(self._split["category"].positions())],
            [DifficultyResult(by, *totals) for by, places in levels.items() for totals in each(places)],
        )


class _Disagreements:
    """On how many samples every two metrics differ, told row by row."""

    def __init__(self, labels: Sequence[str]):
        self._counts = dict.fromkeys(itertools.combinations(labels, 2), 0)

    def append(self, row: Row) -> None:
        """One more row."""
        for pair in self._counts:
            self._counts[pair] += disagree(row, pair)

    def result(self) -> dict[str, int]:
        """``"A | B" → number of samples``."""
        return {f"{first} | {second}": count for (first, second), count in self._counts.items()}


def disagree(row: Row, labels: Sequence[str]) -> bool:
    """Whether the metrics give one row different scores (an unparsed answer counts 0)."""
    entries = [row.get("scores", {}).get(label) for label in labels]
    values = {round(entry.get("value") or 0.0, 9) for entry in entries if entry is not None and "error" not in entry}
    return len(values) > 1


def summarise(
    rows: Iterable[Row],
    metrics: Sequence[Metric],
    header: Mapping[str, Any],
    *,
    path: str = "",
    others: SampleLevels | None = None,
) -> TaskResult:
    """The result of one prediction file. rows: read once, as they come from a file of any length; others: id → a level of difficulty
    by what other runs made of the sample."""
    identity = header["identity"]
    count, counted, facts = 0, _Counted(metrics), FactSums(metrics[0].label)
    apart = _Disagreements([metric.label for metric in metrics])
    totals = [_Total(metric, parts=k == 0, others=others) for k, metric in enumerate(metrics)]
    for row in rows:
        count += 1
        for part in (counted, facts, apart, *totals):
            part.append(row)
    (headline, categories, difficulty), *more = (total.result() for total in totals)
    return TaskResult(
        task=identity["task"],
        version=identity["version"],
        metrics=[headline, *(result for result, _, _ in more)],
        num_samples=count,
        num_unusable=counted.unusable + header.get("num_excluded", 0),
        num_errors=counted.failed,
        problems=[*header.get("problems", []), *counted.lines()],
        data_hash=identity["data"],
        prompt_hash=prompt_hash(header),
        header=dict(header),
        disagreements=apart.result(),
        facts=facts.result(header),
        categories=categories,
        difficulty=difficulty,
        path=path,
    )


class _Counted:
    """Unusable rows, failed generations, and rows that a metric cannot score, told row by row: how many, and the first ids."""

    def __init__(self, metrics: Sequence[Metric]):
        self._kinds = [(metric.label, f"not scorable by {metric.name}") for metric in metrics]
        self._counts: Counter[str] = Counter()
        self._found: dict[str, list[tuple[str, str]]] = {}

    def append(self, row: Row) -> None:
        """One more row."""
        if row.get("unusable"):
            self._note(_UNUSABLE, row, row["unusable"])
        scores = row.get("scores", {})
        for label, kind in self._kinds:
            if "error" in (entry := scores.get(label, {})):
                self._note(kind, row, entry["error"])
        if row.get("error"):
            self._note(_FAILED, row, row["error"])

    def _note(self, kind: str, row: Row, why: Any) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= _NAMED:
            self._found.setdefault(kind, []).append((row["id"], str(why)))

    @property
    def unusable(self) -> int:
        return self._counts[_UNUSABLE]

    @property
    def failed(self) -> int:
        return self._counts[_FAILED]

    def lines(self) -> list[str]:
        """A line for each kind."""
        kinds = (_UNUSABLE, *dict.fromkeys(kind for _, kind in self._kinds), _FAILED)
        return [
            f"{self._counts[kind]} × {kind}: {', '.join(name for name, _ in found)} ({found[0][1]})"
            for kind in kinds
            if (found := self._found.get(kind))
        ]


def prompt_hash(header: Mapping[str, Any]) -> str:
    """Six hex digits over the prompt template, the system prompt and the generation settings."""
    task = header.get("task", {})
    text = repr([task.get("prompt"), task.get("system"), task.get("image_tag"), header["identity"].get("generation")])
    return hashlib.sha256(text.encode()).hexdigest()[:6]
