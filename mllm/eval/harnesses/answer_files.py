"""How do our answer files become lmms-eval's and VLMEvalKit's, and theirs ours?"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm.errors import ConfigError, DataError
from mllm.eval.data.loading import Item, load_data
from mllm.eval.ids import ByName
from mllm.eval.predictions import Row, header_path, iterate_predictions, prediction_path, write_atomic, write_lines
from mllm.eval.report.results import TaskResult, score_fields, summarise
from mllm.eval.run import run_header
from mllm.eval.spool import Spool
from mllm.eval.task import load_task

Form = Literal["lmms-eval", "vlmevalkit"]
FORMS: tuple[Form, ...] = ("lmms-eval", "vlmevalkit")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = 5


def export_answers(predictions: str | Path, output: str | Path, form: Form) -> int:
    """Write a prediction file in another harness's form. Returns the number of answers.

    lmms-eval: JSON lines as ``--log_samples`` writes them (``doc_id`` is the position in our file). vlmevalkit: a table (``.tsv``,
    ``.csv``) with ``index``, ``question``, options ``A`` …, ``answer``, ``category`` and ``prediction``, which its ``--mode eval``
    reads. Raises `ConfigError` for an unknown form or suffix.
    """
    path, target = Path(predictions), Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "lmms-eval":
        write_lines(target, map(_as_lmms_eval, itertools.count(), iterate_predictions(path)))
        return sum(1 for _ in iterate_predictions(path))
    if form != "vlmevalkit":
        raise ConfigError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    mark, count = _mark(target), 0
    most = max((len(row["meta"].get("options") or []) for row in iterate_predictions(path)), default=0)
    with target.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, delimiter=mark)
        writer.writerow(["index", "question", *_LETTERS[:most], "answer", "category", "prediction"])
        for row in iterate_predictions(path):
            options = list(row["meta"].get("options") or [])
            answer = (
                row["target"]
                if isinstance(row["target"], str | int | float)
                else json.dumps(row["target"], ensure_ascii=False)
            )
            padded = [*options, *[""] * (most - len(options))]
            writer.writerow([row["id"], row["question"], *padded, answer, row.get("category") or "", row["output"]])
            count += 1
    return count


def _as_lmms_eval(position: int, row: Row) -> Row:
    return {
        "doc_id": position, "input": row["prompt"], "target": row["target"], "resps": [[row["output"]]],
        "filtered_resps": [row["output"]], "our_id": row["id"],
    }  # fmt: skip


def import_answers(
    answers: str | Path,
    task: str,
    output_dir: str | Path,
    *,
    data: Mapping[str, str | Path] | None = None,
    model: str = "imported",
) -> TaskResult:
    """Score another harness's answers by our rules and write them as a prediction file of ``task``.

    A table is VLMEvalKit's (``index`` is our id, or the position where ids are other names); JSON lines are lmms-eval's
    (``doc_id`` is the position). Questions without an answer, answers without a question, and answers whose stored
    target is not ours are errors that name them: a file of another version of the data is never scored as this one. Raises `DataError`.
    """
    path, spec = Path(answers), load_task(task)
    loaded = load_data(spec, data=data)
    read = _vlmevalkit if path.suffix in (".tsv", ".csv") else _lmms_eval
    found = _Answers(path, loaded.items, read(path, loaded.items))
    metrics = spec.build_metrics()
    header = run_header(None, loaded, metrics, None)
    header["identity"]["model"] = f"{model}: {path.name}"
    header["generator"] = header["imported_from"] = path.name
    target = prediction_path(Path(output_dir), spec.name)
    target.parent.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[Row]:
        for item, reply in zip(loaded.items, found.in_order(), strict=True):
            row: Row = {
                "id": item.id, "question": item.question, "prompt": "", "images": [], "output": reply, "target": item.target,
                "meta": item.meta, "cluster": item.cluster, "category": item.category, "num_prompt_tokens": 0, "num_tokens": 0,
                "key": "",
            }  # fmt: skip
            yield row | score_fields(row, metrics)

    write_lines(target, rows())
    write_atomic(header_path(target), json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    return summarise(iterate_predictions(target), metrics, header, path=str(target))


class _Answers:
    """Replies by the question's place; they lie on disk where they are many. Raises `DataError` for one answered twice, and for
    questions without an answer."""

    def __init__(self, path: Path, items: Sequence[Item], pairs: Iterable[tuple[int, str]]):
        self._replies, self._places = Spool[str](), np.full(len(items), -1)
        for place, reply in pairs:
            if self._places[place] >= 0:
                raise DataError(f"{path}: question {items[place].id} is answered twice")
            self._places[place] = len(self._replies)
            self._replies.append(reply)
        missing = np.flatnonzero(self._places < 0)
        if len(missing):
            names = ", ".join(items[int(place)].id for place in missing[:_SHOWN])
            raise DataError(f"{path}: no answer for {len(missing)} of {len(items)} questions, e.g. {names}")

    def in_order(self) -> Iterator[str]:
        """Of the first question to the last."""
        return (self._replies[place] for place in self._places.tolist())


def _vlmevalkit(path: Path, items: Sequence[Item]) -> Iterator[tuple[int, str]]:
    known = ByName((item.id, float(place)) for place, item in enumerate(items))
    by_name = all(row["index"] in known for row in _table(path))
    for position, row in enumerate(_table(path)):
        place = int(known[row["index"]]) if by_name else position
        _same_target(path, _at(items, place, path), row.get("answer"))
        yield place, row["prediction"] or ""


def _table(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as handle:
        for row in csv.DictReader(handle, delimiter=_mark(path)):
            if not {"index", "prediction"} <= set(row):
                raise DataError(f"{path}: needs the columns index and prediction; it has {', '.join(map(str, row))}")
            yield row


def _lmms_eval(path: Path, items: Sequence[Item]) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                row: dict[str, Any] = json.loads(line)
                position, replies = int(row["doc_id"]), row.get("filtered_resps") or row["resps"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: no line of lmms-eval's samples ({type(error).__name__}: {error})"
                ) from None
            while isinstance(replies, list) and replies:
                replies = replies[0]
            _same_target(path, _at(items, position, path), row.get("target"))
            yield position, str(replies or "")


def _at(items: Sequence[Item], position: int, path: Path) -> Item:
    if not 0 <= position < len(items):
        raise DataError(f"{path}: an answer to question {position}, but the benchmark's file holds {len(items)}")
    return items[position]


def _same_target(path: Path, item: Item, stored: Any) -> None:
    """Refuse an answer whose own target shares nothing with ours: it belongs to another question."""
    if stored in (None, "", []) or item.target is None:
        return
    ours, theirs = (_forms(value, item.meta.get("options") or []) for value in (item.target, stored))
    if not ours & theirs:
        raise DataError(
            f"{path}: question {item.id} has the target {stored!r} there and {item.target!r} here; the files are of other questions"
        )


def _forms(value: Any, options: Sequence[str]) -> set[str]:
    """What a target can be written as: itself, its entries, the letter or text of an option."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    entries = value if isinstance(value, list) else [value]
    texts = {
        str(entry.get("answer") if isinstance(entry, dict) else entry).strip().strip("().").lower() for entry in entries
    }
    for letter, option in zip(_LETTERS.lower(), options):
        if letter in texts or str(option).strip().lower() in texts:
            texts |= {letter, str(option).strip().lower(), str(_LETTERS.lower().index(letter))}
    return texts


def _mark(path: Path) -> str:
    if path.suffix not in (".tsv", ".csv"):
        raise ConfigError(f"{path}: a table ends with .tsv or .csv (save an .xlsx as one of these)")
    return "\t" if path.suffix == ".tsv" else ","
