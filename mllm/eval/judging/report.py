"""What do judges say of a run, and how far are they to be trusted?"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mllm.errors import DataError
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
            result.task, result.label, number(sure.value), spread(sure.low, sure.high), str(result.num_verdicts), unread_rules,
            str(result.missing),
        ))  # fmt: skip
        parts += [(result.task, result.label, name, number(value)) for name, value in result.by_category().items()]
        if result.missing:
            notes.append(f"{result.task}: {result.missing} answers are not judged yet; the same command goes on there.")
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
        values = {result.label: result.values() for result in group}
        pairs = [(a, b, values[a], values[b]) for a, b in itertools.combinations(values, 2)]
        pairs += [(label, "by hand", verdicts, hand) for label, verdicts in values.items() if hand]
        for first, second, one, other in pairs:
            with contextlib.suppress(DataError):  # no sample in common
                found.append((task, agreement((first, second), one, other)))
    return found


def _plain(result: Judged) -> dict[str, object]:
    sure = result.estimate()
    kept = {"task": result.task, "judge": result.judge, "answered_by": result.answered_by, "prompt": result.prompt}
    return kept | {
        "estimate": asdict(sure),
        "unread": result.unread,
        "missing": result.missing,
        "path": result.path,
    }
