"""What do judges say of a run, and how far are they to be trusted?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mllm.eval.judging.agreement import Agreement, agreement
from mllm.eval.judging.judge import Judged
from mllm.eval.studies.study import Study, Table, number, save_study, spread


def judging_study(
    results: Sequence[Judged], hand: Mapping[str, float] | None = None, *, folder: str | Path | None = None
) -> Study:
    """Scores by judge, their agreement with each other and with a person's verdicts; written into ``folder`` when given."""
    rows, parts, pairs = [], [], []
    notes = ["A judge's number stands only with its judge: name, version and prompt are part of it."]
    for result in results:
        sure = result.estimate()
        unread = sum(result.unread.values())
        unread_rules = ", ".join(f"{count} {rule}" for rule, count in result.unread.items()) or "–"
        rows.append((
            result.task, result.label, number(sure.value), spread(sure.low, sure.high), str(len(result.verdicts)), unread_rules,
            str(len(result.missing)),
        ))  # fmt: skip
        parts += [(result.task, result.label, name, number(value)) for name, value in result.by_category().items()]
        if result.missing:
            notes.append(
                f"{result.task}: {len(result.missing)} answers are not judged yet; the same command goes on there."
            )
        if unread:
            notes.append(
                f"{result.task}: {unread} replies of {result.judge} give no verdict and "
                + ("are left out of the ratio." if result.reads == "rating" else "count as wrong.")
            )
        notes.append(f"{result.task}: {result.prompt} · {result.source}")
    agreements = _agreements(results, hand)
    for task, found in agreements:
        pairs.append((
            task, found.first, found.second, str(found.num_samples), number(100 * found.agreed, 1), number(found.kappa),
            number(100 * found.first_mean, 1), number(100 * found.second_mean, 1),
        ))  # fmt: skip
    headings = ("task", "judge", "score %", "95 %", "n", "no verdict", "missing")
    tables = [Table("Scores by judge", headings, rows, 2)]
    if parts:
        tables.append(Table("By category", ("task", "judge", "category", "score %"), parts, 3))
    if pairs:
        columns = ("task", "A", "B", "n", "agree %", "kappa", "A %", "B %")
        tables.append(Table("Agreement", columns, pairs, 3))
    if not hand:
        notes.append("No hand verdicts were given (`--sheet 50` writes a sheet to fill in, `--hand FILE` reads it).")
    data = {
        "judged": [_plain(result) for result in results],
        "agreement": [asdict(found) | {"task": t} for t, found in agreements],
    }
    study = Study("judges", "Verdicts of judges", list(dict.fromkeys(notes)), tables, data)
    if folder is not None:
        save_study(study, folder)
    return study


def _agreements(results: Sequence[Judged], hand: Mapping[str, float] | None) -> list[tuple[str, Agreement]]:
    found = []
    by_task: dict[str, list[Judged]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(result)
    for task, group in by_task.items():
        values = {r.label: {n: v["value"] or 0.0 for n, v in r.verdicts.items()} for r in group}
        for first, second in itertools.combinations(values, 2):
            if set(values[first]) & set(values[second]):
                found.append((task, agreement((first, second), values[first], values[second])))
        for label, verdicts in values.items():
            if hand and set(hand) & set(verdicts):
                found.append((task, agreement((label, "by hand"), verdicts, hand)))
    return found


def _plain(result: Judged) -> dict[str, object]:
    sure = result.estimate()
    kept = {"task": result.task, "judge": result.judge, "answered_by": result.answered_by, "prompt": result.prompt}
    return kept | {
        "estimate": asdict(sure),
        "unread": result.unread,
        "missing": len(result.missing),
        "path": result.path,
    }
