"""Is model B better than model A on the same questions?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics import build_metric
from mllm.eval.predictions import header_path, iterate_files, read_predictions
from mllm.eval.report.results import clusters_of, score_fields, scored_items, statistic_of
from mllm.eval.report.statistics import Comparison, holm, paired_bootstrap, paired_comparison

_DRAWS = 1000


@dataclass(frozen=True)
class TaskComparison:
    """B minus A on one task and metric, in display units. adjusted: p-value after Holm over the tasks compared
    together."""

    task: str
    metric: str
    unit: str
    value_a: float
    value_b: float
    comparison: Comparison
    adjusted: float


def compare_predictions(first: str | Path, second: str | Path, *, seed: int = 0) -> list[TaskComparison]:
    """Compare two prediction files, or the tasks that two folders share, by each task's headline metric, scored anew
    for both.

    Raises `DataError` when a task's sample sets, targets or groups differ: unmatched samples are never dropped.
    """
    pairs = _pairs(Path(first), Path(second))
    unadjusted: list[tuple[Any, ...]] = []
    for path_a, path_b in pairs:
        rows_a, header_a = read_predictions(path_a), _header(path_a)
        rows_b, header_b = read_predictions(path_b), _header(path_b)
        task = header_a["identity"]["task"]
        _refuse_unmatched(task, rows_a, rows_b, header_a, header_b)
        metric = build_metric(header_a["task"]["metrics"][0])
        by_id = {row["id"]: row for row in rows_b}
        rows_a = [row | score_fields(row, [metric]) for row in rows_a]
        rows_b = [by_id[row["id"]] | score_fields(by_id[row["id"]], [metric]) for row in rows_a]
        items_a, kept_a = scored_items(rows_a, metric)
        items_b, kept_b = scored_items(rows_b, metric)
        if [row["id"] for row in kept_a] != [row["id"] for row in kept_b]:
            only = sorted({row["id"] for row in kept_a} ^ {row["id"] for row in kept_b})
            raise DataError(f"{task}: {len(only)} samples could be used in one run only: {', '.join(only[:5])}")
        clusters = clusters_of(kept_a, metric)
        if metric.is_mean:
            values_a, values_b = ([item.value for item in items] for items in (items_a, items_b))
            result = paired_comparison(values_a, values_b, clusters=clusters, binary=metric.binary, seed=seed)
            result = _scaled(result, metric.scale)
        else:
            result = paired_bootstrap(
                statistic_of(metric, items_a), statistic_of(metric, items_b), clusters, repeats=_DRAWS, seed=seed
            )
        totals = metric.aggregate(items_a)["score"], metric.aggregate(items_b)["score"]
        unadjusted.append((task, metric.label, metric.unit, *totals, result))
    adjusted = holm([entry[-1].p_value for entry in unadjusted])
    return [TaskComparison(*entry, adjusted=p) for entry, p in zip(unadjusted, adjusted)]


def _scaled(result: Comparison, scale: float) -> Comparison:
    from dataclasses import replace

    return replace(result, difference=scale * result.difference, low=scale * result.low, high=scale * result.high)


def _pairs(first: Path, second: Path) -> list[tuple[Path, Path]]:
    for place in (first, second):
        if not place.exists():
            raise ConfigError(f"{place}: no such prediction file or folder")
    if first.is_file() != second.is_file():
        raise ConfigError(f"compare two files or two folders; {first} and {second} are one of each")
    if first.is_file():
        return [(first, second)]
    names_a, names_b = ({path.name: path for path in iterate_files(place)} for place in (first, second))
    if not names_a or not names_b:
        raise ConfigError(f"{first if not names_a else second} holds no finished prediction file")
    if set(names_a) != set(names_b):
        only = sorted(set(names_a) ^ set(names_b))
        raise DataError(
            f"the folders hold different tasks: {', '.join(only)} in one only; name the two files to compare one task"
        )
    return [(names_a[name], names_b[name]) for name in sorted(names_a)]


def _header(path: Path) -> dict[str, Any]:
    try:
        return json.loads(header_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{header_path(path)}: needed beside {path.name}, cannot be read ({error})") from None


def _refuse_unmatched(task: str, rows_a: list, rows_b: list, header_a: dict, header_b: dict) -> None:
    ids_a, ids_b = {row["id"] for row in rows_a}, {row["id"] for row in rows_b}
    if ids_a != ids_b:
        unmatched = [
            f"{len(ids)} only in {name} ({', '.join(sorted(ids)[:3])})"
            for ids, name in ((ids_a - ids_b, "A"), (ids_b - ids_a, "B"))
            if ids
        ]
        raise DataError(
            f"{task}: the runs answered different samples: {'; '.join(unmatched)}. Compare runs over the same ids"
        )
    for key in ("task", "version"):
        if header_a["identity"][key] != header_b["identity"][key]:
            raise DataError(
                f"{key} differs: {header_a['identity'][key]!r} and {header_b['identity'][key]!r}; run one again"
            )
    targets = {row["id"]: row["target"] for row in rows_b}
    changed = [row["id"] for row in rows_a if row["target"] != targets[row["id"]]]
    if changed:
        raise DataError(
            f"{task}: {len(changed)} samples have different targets, e.g. {changed[0]!r}: the data versions differ"
        )
