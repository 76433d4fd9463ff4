"""What do scored predictions add up to, under each metric, and how sure is it?"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval.metrics import Metric, Score, Scored
from mllm.eval.report.facts import AnswerFacts, answer_facts, refused
from mllm.eval.report.statistics import Estimate, bootstrap_estimate, mean_estimate, wilson_interval

Row = dict[str, Any]
_DRAWS = 200


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


def scored_items(rows: Sequence[Row], metric: Metric) -> tuple[list[Scored], list[Row]]:
    """(samples that the metric scored, their rows). A failed generation counts as a wrong, unparsed answer; rows
    without a target, an undecodable image or a usable target take no part."""
    items, kept = [], []
    for row in rows:
        entry = row.get("scores", {}).get(metric.label)
        if entry is None or "error" in entry:
            continue
        score = Score(entry["value"], entry["extracted"], entry["rule"], entry.get("parts", {}))
        items.append(Scored(row["id"], score, row["target"], row["meta"]))
        kept.append(row)
    return items, kept


def clusters_of(rows: Sequence[Row], metric: Metric) -> list[Hashable]:
    """What makes samples dependent: the task's cluster, else the metric's own groups, else nothing."""
    if all(row.get("cluster") is not None for row in rows):
        return [row["cluster"] for row in rows]
    if metric.group_key is not None:
        return [str(row["meta"].get(metric.group_key, row["id"])) for row in rows]
    return [row["id"] if row.get("cluster") is None else row["cluster"] for row in rows]


def statistic_of(metric: Metric, items: Sequence[Scored]) -> Callable[[np.ndarray], float]:
    """The metric's headline as a function of sample positions. A group that a bootstrap draws twice stays two
    groups."""

    def statistic(positions: np.ndarray) -> float:
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


def estimate(metric: Metric, items: Sequence[Scored], rows: Sequence[Row], *, draws: int = _DRAWS) -> Estimate:
    """Headline with its uncertainty, in display units."""
    clusters = clusters_of(rows, metric)
    if not metric.is_mean:
        return _at_the_edge(bootstrap_estimate(statistic_of(metric, items), clusters, repeats=draws), metric, clusters)
    result = mean_estimate([item.value for item in items], clusters=clusters, binary=metric.binary)
    scaled = {name: metric.scale * getattr(result, name) for name in ("value", "standard_error", "low", "high")}
    return replace(result, **scaled)


def _at_the_edge(result: Estimate, metric: Metric, clusters: Sequence[Hashable]) -> Estimate:
    """No draw differs from a percentage of 0 or 100, so a bootstrap's interval there is a point; Wilson's over the groups is
    not."""
    if metric.scale != 100 or result.value not in (0.0, 100.0) or not clusters:
        return result
    groups = len(set(clusters))
    low, high = wilson_interval(result.value / 100 * groups, groups)
    return replace(
        result, low=100 * low, high=100 * high, method=f"Wilson over {groups} groups (every draw is the same)"
    )


def metric_result(metric: Metric, rows: Sequence[Row]) -> MetricResult:
    """One metric's total over prediction rows."""
    items, kept = scored_items(rows, metric)
    details = metric.aggregate(items)
    sure = estimate(metric, items, kept)
    return MetricResult(
        metric.label, metric.protocol, metric.unit, metric.scale, details["score"], sure.standard_error, sure.low,
        sure.high, sure.method, len(items), sum(item.score.value is None for item in items), sure.num_clusters, details,
    )  # fmt: skip


def by_category(metric: Metric, rows: Sequence[Row]) -> list[CategoryResult]:
    """The metric over each category's samples, the largest category first. A group of samples that are scored together (pairs,
    circles) belongs to the category of its first."""
    items, kept = scored_items(rows, metric)
    places: dict[str, list[int]] = {}
    of_group: dict[Any, str] = {}
    for position, row in enumerate(kept):
        name = row.get("category")
        if name is None:
            continue
        if metric.group_key is not None and metric.group_key in row["meta"]:
            name = of_group.setdefault(str(row["meta"][metric.group_key]), name)
        places.setdefault(str(name), []).append(position)
    found = []
    for name, positions in sorted(places.items(), key=lambda place: (-len(place[1]), place[0])):
        sure = estimate(metric, [items[k] for k in positions], [kept[k] for k in positions])
        found.append(CategoryResult(name, sure.value, sure.low, sure.high, len(positions)))
    return found if len(found) > 1 else []


def disagreements(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, int]:
    """``"A | B" → number of samples`` that two metrics score differently, for every pair."""
    counts = {}
    for first, second in itertools.combinations(labels, 2):
        counts[f"{first} | {second}"] = sum(disagree(row, (first, second)) for row in rows)
    return counts


def disagree(row: Row, labels: Sequence[str]) -> bool:
    """Whether the metrics give one row different scores (an unparsed answer counts 0)."""
    entries = [row.get("scores", {}).get(label) for label in labels]
    values = {round(entry.get("value") or 0.0, 9) for entry in entries if entry is not None and "error" not in entry}
    return len(values) > 1


_SUMMED = (
    "id",
    "scores",
    "target",
    "meta",
    "cluster",
    "category",
    "unusable",
    "error",
    "num_tokens",
    "num_prompt_tokens",
    "logprob",
)


def slim(row: Row) -> Row:
    """What of a row its task's result is made of: without question, prompt and answer a million fit into memory."""
    return {key: row[key] for key in _SUMMED if key in row} | {"refused": refused(row)}


def summarise(
    rows: Sequence[Row], metrics: Sequence[Metric], header: Mapping[str, Any], *, path: str = ""
) -> TaskResult:
    """The result of one prediction file."""
    identity = header["identity"]
    problems = list(header.get("problems", []))
    unusable = [row for row in rows if row.get("unusable")]
    if unusable:
        problems.append(
            f"{len(unusable)} × unusable: {', '.join(r['id'] for r in unusable[:5])} ({unusable[0]['unusable']})"
        )
    for metric in metrics:
        failed = [row for row in rows if "error" in row.get("scores", {}).get(metric.label, {})]
        if failed:
            names = ", ".join(row["id"] for row in failed[:5])
            problems.append(
                f"{len(failed)} × not scorable by {metric.name}: {names} ({failed[0]['scores'][metric.label]['error']})"
            )
    errors = [row for row in rows if row.get("error")]
    if errors:
        names = ", ".join(row["id"] for row in errors[:5])
        problems.append(f"{len(errors)} × generation failed, counted as wrong: {names} ({errors[0]['error']})")
    return TaskResult(
        task=identity["task"],
        version=identity["version"],
        metrics=[metric_result(metric, rows) for metric in metrics],
        num_samples=len(rows),
        num_unusable=len(unusable) + header.get("num_excluded", 0),
        num_errors=len(errors),
        problems=problems,
        data_hash=identity["data"],
        prompt_hash=prompt_hash(header),
        header=dict(header),
        disagreements=disagreements(rows, [metric.label for metric in metrics]),
        facts=answer_facts(rows, header, metrics[0].label),
        categories=by_category(metrics[0], rows),
        path=path,
    )


def prompt_hash(header: Mapping[str, Any]) -> str:
    """Six hex digits over the prompt template, the system prompt and the generation settings."""
    task = header.get("task", {})
    text = repr([task.get("prompt"), task.get("system"), task.get("image_tag"), header["identity"].get("generation")])
    return hashlib.sha256(text.encode()).hexdigest()[:6]
