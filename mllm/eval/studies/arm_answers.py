"""What do the arms of a study answer? One page of questions with their pictures, every arm's answer marked right or wrong."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mllm.errors import DataError
from mllm.eval.metrics import build_metric
from mllm.eval.predictions import iterate_predictions, prediction_path, write_atomic
from mllm.eval.report.page import page_head
from mllm.eval.report.results import Row, score_fields
from mllm.eval.report.samples import embedded
from mllm.eval.studies.arms import ArmsSpec, run_folder
from mllm.eval.task import load_task

NUMBER = 20
FILE = "answers.html"


def save_answers(spec: ArmsSpec, output: Path, *, number: int = NUMBER) -> Path:
    """Write ``answers.html`` into the study's folder, of each arm's first finished seed. Raises `DataError` where none is finished
    and where an arm was not asked the questions that are shown."""
    path = output / FILE
    write_atomic(path, answers_page(spec, output, number=number))
    return path


def answers_page(spec: ArmsSpec, output: Path, *, number: int = NUMBER) -> str:
    """The page: ``number`` questions, pictures inside, so that it is one file that can be sent."""
    folders: dict[str, Path] = {}
    for name, arm in spec.arms.items():
        evaluated = (run_folder(output, name, seed) / "eval" for seed in arm.seeds)
        folder = next((folder for folder in evaluated if (folder / "results.json").is_file()), None)
        if folder is not None:
            folders[name] = folder
    if not folders:
        raise DataError(f"{output}: no arm is trained and evaluated yet")
    first = next(iter(folders.values()))
    wanted = chosen(iterate_predictions(prediction_path(first, spec.task)), number)
    answers = {name: _answers(spec, folder, set(wanted)) for name, folder in folders.items()}
    parts = page_head(f"{spec.name}: {len(wanted)} questions")
    parts.append(
        f"<p>{html.escape(spec.description)}. The questions were picked by a hash of their names, of every kind in turn, whatever the "
        f"answers are. Right and wrong by {html.escape(build_metric(load_task(spec.task).metrics[0]).label)}.</p>"
    )
    parts.append(_legend(spec, answers))
    for name in wanted:
        places = [folder / "thumbnails" for folder in folders.values()]
        parts.append(_question(name, answers, places))
    return "\n".join([*parts, "</html>\n"])


def chosen(rows: Iterable[Row], number: int) -> list[str]:
    """Ids of ``number`` questions: of every category in turn, in each by a hash of the id."""
    best: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        entry = (hashlib.sha256(row["id"].encode()).hexdigest(), row["id"])
        mine = best.setdefault(str(row.get("category")), [])
        mine.append(entry)
        if len(mine) > 2 * number:
            mine[:] = sorted(mine)[:number]
    queues = [sorted(best[category])[:number] for category in sorted(best)]
    turns = [queue[turn][1] for turn in range(number) for queue in queues if turn < len(queue)]
    return turns[:number]


def _answers(spec: ArmsSpec, folder: Path, wanted: set[str]) -> dict[str, tuple[Row, bool]]:
    """Id → row and whether it is right."""
    metric = build_metric(load_task(spec.task).metrics[0])
    found = {}
    for row in iterate_predictions(prediction_path(folder, spec.task)):
        if row["id"] in wanted:
            value = score_fields(row, [metric])["scores"][metric.label].get("value")
            found[row["id"]] = (row, (value or 0) >= 1)
    if missing := sorted(wanted - set(found)):
        raise DataError(
            f"{folder}: was not asked {missing[0]!r} and {len(missing) - 1} more of the questions that the other arms were asked; "
            "evaluate the arms with the same settings"
        )
    return found


def _legend(spec: ArmsSpec, answers: Mapping[str, Mapping[str, tuple[Row, bool]]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(spec.arms[name].what)}<td class=n>{sum(right for _, right in mine.values())}</tr>"
        for name, mine in answers.items()
    )
    return f"<table><tr><th>arm<th>what<th class=n>right here</tr>{rows}</table>"


def _question(name: str, answers: Mapping[str, Mapping[str, tuple[Row, bool]]], places: list[Path]) -> str:
    row: dict[str, Any] = next(iter(answers.values()))[name][0]
    target = row["target"] if isinstance(row["target"], str) else " or ".join(map(str, row["target"] or ["(none)"]))
    lines = [f"<div class=q>{html.escape(str(row['question']))}</div>"]
    lines.append(f"<div><span class=k>target</span> {html.escape(target)}</div>")
    for arm, mine in answers.items():
        given, right = mine[name]
        text = html.escape(str(given.get("error") or given.get("unusable") or given["output"]))
        mark = "right" if right else "wrong"
        lines.append(
            f'<div><span class=k>{html.escape(arm)} {mark}</span> <span class="p {mark[0]}">{text or "(nothing)"}</span></div>'
        )
    lines.append(f"<div class=note>{html.escape(name)} · {html.escape(str(row.get('category')))}</div>")
    return f"<div class=s><div>{_pictures(row['images'], places)}</div><div>{''.join(lines)}</div></div>"


def _pictures(digests: list[str], places: list[Path]) -> str:
    """Each picture from the first arm that kept a small copy of it."""
    shown = []
    for digest in digests:
        found = (place for place in places if (place / f"{digest[:24]}.jpg").is_file())
        shown.append(embedded(next(found, places[0]))(digest))
    return "".join(shown)
