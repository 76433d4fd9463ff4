"""Which pairs of a right and a wrong answer does a model's own evaluation give, for a stage of kind ``dpo`` to learn from?"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError, MllmError
from mllm.eval.predictions import iterate_predictions
from mllm.eval.task import load_task


@dataclass(frozen=True)
class Pairs:
    """What was written. kinds: kind of question → pairs; skipped: reason → answers that gave none."""

    path: Path
    rows: int
    kinds: dict[str, int]
    skipped: dict[str, int]


def write_pairs(predictions: Path, rows: Path, output: Path, *, kinds: Collection[str] = ()) -> Pairs:
    """Write a row for every wrong answer: the row that was asked (``image``, ``question``, ``answer`` …) and, as ``rejected``, what the
    model said, wrong by the first rule of the evaluation.

    predictions: a file of `mllm eval`; rows: the file that it asked (``test.jsonl`` of `mllm data build charts`), whose pictures lie beside
    it, as they will beside ``output``; kinds: only these kinds of questions, default all. Raises `ConfigError` for the questions of the
    benchmark itself, for an ``output`` in another folder and for kinds that were not asked, `DataError` where the two files do not belong
    together and where no answer is wrong.
    """
    if output.resolve().parent != rows.resolve().parent:
        raise ConfigError(f"{output}: pictures are found from {rows.parent}; write the pairs there")
    _not_the_benchmarks(predictions, rows)
    known = _asked(rows)
    if unknown := sorted(set(kinds) - (there := {str(row.get("kind")) for row in known.values()})):
        raise ConfigError(f"kind of question {unknown[0]!r}: {rows} asks {', '.join(sorted(there))}")
    found: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    for answer in iterate_predictions(predictions):
        row = known.get(answer["id"])
        if row is None or row["question"] != answer["question"]:
            raise DataError(
                f"{predictions}: answers {answer['id']!r}, which {rows} does not ask so; give the rows that it asked"
            )
        if kinds and row.get("kind") not in kinds:
            skipped["of another kind"] += 1
        elif (reason := _no_pair(answer)) is not None:
            skipped[reason] += 1
        else:
            found.append({**row, "rejected": answer["output"].strip()})
    if not found:
        raise DataError(f"{predictions}: no wrong answer to learn from ({dict(skipped)})")
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    by_kind = Counter(str(row.get("kind")) for row in found)
    return Pairs(output, len(found), dict(by_kind.most_common()), dict(skipped.most_common()))


def write_questions(charts: Path, output: Path, *, kinds: Collection[str] = (), limit: int | None = None) -> Pairs:
    """Write what training charts ask as a benchmark asks it, a question a row, to ``output/test.jsonl``, so that a model can be evaluated
    on it (``--data real_charts=OUTPUT``) and learn from what it says wrongly. Training charts are drawn of no table that the benchmark
    holds, nor of a copy of one; charts drawn anew of the same sources may be.

    charts: ``train.jsonl`` of `mllm data build charts`; its pictures are linked into ``output``. kinds: only these kinds of questions;
    limit: only so many, by a hash of their names. Raises `ConfigError` for kinds that are not asked and for a folder that holds these
    charts or others, `DataError` for a file without kinds.
    """
    if output.resolve() == charts.resolve().parent:
        raise ConfigError(f"{output}: holds the charts themselves; give another folder, e.g. {output}_pairs")
    found = [question for row in _drawn(charts) for question in _questions(row)]
    if unknown := sorted(set(kinds) - (there := {row["kind"] for row in found})):
        raise ConfigError(f"kind of question {unknown[0]!r}: {charts} asks {', '.join(sorted(there))}")
    wanted = [row for row in found if not kinds or row["kind"] in kinds]
    wanted = sorted(wanted, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:limit]
    output.mkdir(parents=True, exist_ok=True)
    for folder in sorted({Path(row["image"]).parts[0] for row in wanted}):
        link, pictures = output / folder, (charts.parent / folder).resolve()
        if not link.exists():
            link.symlink_to(pictures, target_is_directory=True)
        elif link.resolve() != pictures:
            raise ConfigError(f"{link}: holds other pictures than {pictures}; give another folder")
    path = output / "test.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wanted), encoding="utf-8")
    by_kind = Counter(row["kind"] for row in wanted)
    return Pairs(
        path, len(wanted), dict(by_kind.most_common()), {"of another kind or above the limit": len(found) - len(wanted)}
    )


def _drawn(charts: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in charts.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{charts}: cannot be read as the train.jsonl of drawn charts ({error})") from None
    if not rows or any(
        not isinstance(row, dict) or not {"id", "messages", "kinds", "table"} <= set(row) for row in rows
    ):
        raise DataError(
            f"{charts}: expected rows with id, messages, kinds and table, as `mllm data build charts` writes train.jsonl"
        )
    return rows


def _questions(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A chart's questions, each by itself."""
    first, *_ = row["messages"]
    image = next(part["image"] for part in first["content"] if part["type"] == "image")
    said = [
        "".join(part.get("text", "") for part in turn["content"]).strip()
        if isinstance(turn["content"], list)
        else turn["content"]
        for turn in row["messages"]
    ]
    pairs = zip(said[::2], said[1::2], row["kinds"], strict=True)
    kept = {"table": row["table"], "chart": row.get("chart"), "renderer": row.get("renderer"), "printed": False}
    return [
        {"id": f"{row['id']}-{number}", "image": image, "question": question, "answer": answer, "kind": kind, **kept}
        for number, (question, answer, kind) in enumerate(pairs)
    ]


def _no_pair(answer: dict[str, Any]) -> str | None:
    """Why an answer gives no pair."""
    scores = list(answer.get("scores", {}).values())
    if answer.get("error") or not scores or scores[0].get("value") is None:
        return "without a score"
    if scores[0]["value"] > 0:
        return "right, or nearly"
    return None if answer["output"].strip() else "without words"


def _asked(rows: Path) -> dict[str, dict[str, Any]]:
    """Id → row."""
    try:
        lines = rows.read_text(encoding="utf-8").splitlines()
        found = {row["id"]: row for row in map(json.loads, lines) if {"image", "question", "answer"} <= set(row)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{rows}: cannot be read as rows with id, image, question and answer ({error})") from None
    if not found:
        raise DataError(f"{rows}: no row with id, image, question and answer")
    return found


def _not_the_benchmarks(predictions: Path, rows: Path) -> None:
    """Whoever learns from a benchmark's own questions has no benchmark any more."""
    try:
        task = load_task(predictions.name.split(".")[0])
    except MllmError:  # a benchmark of one's own by its path
        return
    declared = [Path(task.data_dir or "") / file.path for source in task.sources for file in source.files]
    if task.data_dir and rows.resolve() in {path.resolve() for path in declared}:
        raise ConfigError(
            f"{rows}: these are what benchmark {task.name} asks; ask about other charts (`mllm data build charts … --test-sources` with "
            f"sources that are trained on) and evaluate with --data {task.name}=FOLDER"
        )
