"""Is model B better than model A on the same questions?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError
from mllm.eval.ids import Ids
from mllm.eval.metrics import build_metric
from mllm.eval.predictions import header_path, iterate_files, iterate_predictions, rows_in_order
from mllm.eval.report.columns import Clusters, ScoredItems, scored
from mllm.eval.report.results import HELD, score_fields, statistic_of
from mllm.eval.report.statistics import Comparison, holm, paired_bootstrap, paired_comparison
from mllm.eval.report.tallies import paired_tallies
from mllm.eval.spool import Names

_DRAWS = 1000
_NAMED = 5


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
    unadjusted = [_compared(path_a, path_b, seed) for path_a, path_b in pairs]
    adjusted = holm([entry[-1].p_value for entry in unadjusted])
    return [TaskComparison(*entry, adjusted=p) for entry, p in zip(unadjusted, adjusted)]


def _compared(path_a: Path, path_b: Path, seed: int) -> tuple[str, str, str, float, float, Comparison]:
    """One task: what `TaskComparison` has before the adjustment. Both files are read row by row, so that a million fit."""
    header_a, header_b = _header(path_a), _header(path_b)
    task = header_a["identity"]["task"]
    ids = _same_ids(task, path_a, path_b)
    for key in ("task", "version"):
        if header_a["identity"][key] != header_b["identity"][key]:
            raise DataError(
                f"{key} differs: {header_a['identity'][key]!r} and {header_b['identity'][key]!r}; run one again"
            )
    metric = build_metric(header_a["task"]["metrics"][0])
    items_a, items_b, clusters = ScoredItems(metric), ScoredItems(metric), Clusters(metric)
    changed, alone = _Noted(), _Noted()
    for row_a, row_b in zip(iterate_predictions(path_a), rows_in_order(path_b, ids), strict=True):
        if row_a["target"] != row_b["target"]:
            changed.append(row_a["id"])
        facts_a, facts_b = (scored(row | score_fields(row, [metric]), metric) for row in (row_a, row_b))
        if facts_a is not None and facts_b is not None:
            items_a.append(row_a["id"], facts_a)
            items_b.append(row_a["id"], facts_b)
            clusters.append(row_a)
        elif facts_a is not facts_b:
            alone.append(row_a["id"])
    if changed.count:
        raise DataError(
            f"{task}: {changed.count} samples have different targets, e.g. {changed.names[0]!r}: the data versions differ"
        )
    if alone.count:
        raise DataError(f"{task}: {alone.count} samples could be used in one run only: {', '.join(alone.names)}")
    codes = clusters.codes()
    if metric.is_mean:
        result = paired_comparison(items_a.values, items_b.values, clusters=codes, binary=metric.binary, seed=seed)
        result = _scaled(result, metric.scale)
    elif (drawn_a := items_a.drawn(codes)) is not None and (drawn_b := items_b.drawn(codes)) is not None:
        result = paired_tallies(drawn_a, drawn_b, repeats=_DRAWS, seed=seed)
    else:
        held = [list(items) if len(items) <= HELD else items for items in (items_a, items_b)]
        first, second = (statistic_of(metric, items) for items in held)
        result = paired_bootstrap(first, second, codes, repeats=_DRAWS, seed=seed)
    totals = metric.aggregate(items_a)["score"], metric.aggregate(items_b)["score"]
    return task, metric.label, metric.unit, *totals, result


def _scaled(result: Comparison, scale: float) -> Comparison:
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


def _same_ids(task: str, path_a: Path, path_b: Path) -> Names:
    """The ids of both files, in the first one's order."""
    names_a, names_b = (Names(row["id"] for row in iterate_predictions(path)) for path in (path_a, path_b))
    if len(names_a) == len(names_b) and all(map(str.__eq__, names_a, names_b)):
        return names_a
    known_a, known_b = Ids(names_a), Ids(names_b)
    only = {
        "A": [name for name in names_a if name not in known_b],
        "B": [name for name in names_b if name not in known_a],
    }
    unmatched = [f"{len(ids)} only in {name} ({', '.join(sorted(ids)[:3])})" for name, ids in only.items() if ids]
    if unmatched:
        raise DataError(
            f"{task}: the runs answered different samples: {'; '.join(unmatched)}. Compare runs over the same ids"
        )
    return names_a


@dataclass
class _Noted:
    """How many ids, and the first by name."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def append(self, name: str) -> None:
        self.count += 1
        if self.count <= _NAMED:
            self.names.append(name)
