"""How do rows become questions with targets, and what is wrong with those that do not?"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError
from mllm.eval.data.pictures import Frames, Picture, picture
from mllm.eval.data.sources import Found, Row, find_sources
from mllm.eval.data.templates import clean, evaluate, lettered, render
from mllm.eval.ids import Ids
from mllm.eval.spool import Spool
from mllm.eval.task import SourceSpec, TaskSpec, data_folder
from mllm.types import IMAGE_MARK, Turn

_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """Why a row is no usable sample. kind: a few words to count by; message: what exactly."""

    id: str
    kind: str
    message: str


@dataclass
class Item:
    """One question of a benchmark. target: None when the answer is missing or hidden. turns hold `IMAGE_MARK` per
    picture."""

    id: str
    question: str
    turns: list[Turn]
    pictures: list[Picture | Frames]
    target: Any
    meta: dict[str, Any]
    cluster: str | None = None
    category: str | None = None

    @property
    def num_images(self) -> int:
        """Images the model is shown: one per picture, the frame count per video."""
        return sum(p.count if isinstance(p, Frames) else 1 for p in self.pictures)


@dataclass
class TaskData:
    """A task's samples. num_rows counts everything read; problems name what could not be used or scored."""

    task: TaskSpec
    source: str
    items: Sequence[Item]
    problems: list[Problem]
    num_rows: int
    data_hash: str
    limited: bool = field(default=False)

    def describe_problems(self) -> list[str]:
        """One line per kind and column: how many, and the first few by name."""
        groups: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            column = problem.message.partition(":")[0] if problem.message.startswith("column ") else ""
            groups.setdefault((problem.kind, column), []).append(problem)
        lines = []
        for (kind, _), group in groups.items():
            names = ", ".join(problem.id for problem in group[:_SHOWN]) + (" …" if len(group) > _SHOWN else "")
            lines.append(f"{len(group)} × {kind}: {names} ({group[0].message})")
        return lines


def load_data(
    task: TaskSpec,
    *,
    data: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    ids: Sequence[str] | None = None,
    strict: bool = False,
) -> TaskData:
    """Read a task's samples.

    limit: about so many, spread evenly over the benchmark, groups kept whole. ids: only these; an unknown one raises
    `ConfigError`. strict: any problem raises. A problem that every row has (a wrong field, no picture there) always
    raises `DataError`: that is a wrong file, not a wrong row.
    """
    found = _choose_source(task, find_sources(task, data_folder(task, data)))
    source, folder, rows = found.source, found.folder, found.rows()
    spool = Spool[Item]()
    problems: list[Problem] = []
    seen, kept = Ids(), Ids()
    num_rows = 0
    chooses = _lists_options(task, source) and task.build_metrics()[0].chooses
    for row in rows:
        name = f"row {row['_index']}"
        num_rows += 1
        try:
            if source.where is not None and not evaluate(source.where, row, "where"):
                num_rows -= 1
                continue
            if source.unique is not None:
                value = str(evaluate(source.unique, row, "unique"))
                if not kept.add(value):
                    num_rows -= 1
                    continue
            name = str(evaluate(source.columns.id, row, "id"))
            item = _build(task, source, row, name, folder)
            if chooses and not item.meta.get("options"):
                raise DataError(
                    f"no options ({source.columns.options} gives none), so the answer {item.target!r} chooses nothing"
                )
        except DataError as error:
            problems.append(Problem(name, "unusable row", str(error)))
            continue
        if not seen.add(item.id):
            problems.append(
                Problem(
                    item.id, "duplicate id", f"row {row['_index']} repeats the id {item.id!r}; the first one is kept"
                )
            )
            continue
        if missing := [p for p in item.pictures if p.missing()]:
            place = missing[0].path if isinstance(missing[0], Frames) else missing[0].source
            problems.append(Problem(item.id, "missing image", f"{place} does not exist"))
            continue
        if item.target is None and source.columns.answers is not None:
            problems.append(Problem(item.id, "missing answer", "no answer: the reply is recorded and not scored"))
        spool.append(item)
    items = spool.settled()
    _refuse_useless(task, items, problems, num_rows, strict)
    digest = data_hash(items)
    chosen = _choose(task, items, limit, ids)
    return TaskData(task, source.name, chosen, problems, num_rows, digest, len(chosen) < len(items))


def _lists_options(task: TaskSpec, source: SourceSpec) -> bool:
    """Whether a question is asked with options from a column (others have them in their text)."""
    return source.columns.options is not None and any(word in task.prompt for word in ("choices", "options"))


def _choose_source(task: TaskSpec, found: list[Found]) -> Found:
    """The first source whose columns fit its first row: two layouts can have files of the same name. None fits: the
    first."""
    for candidate in found if len(found) > 1 else []:
        row = next(iter(candidate.rows()), None)
        if row is None:
            continue
        try:
            _build(task, candidate.source, row, "0", candidate.folder)
        except DataError:
            continue
        return candidate
    return found[0]


def _build(task: TaskSpec, source: SourceSpec, row: Row, name: str, folder: Path) -> Item:
    columns = source.columns
    row = row | {"_frames": task.frames}
    question = clean(str(evaluate(columns.question, row, "question")).strip())
    options = _plain(evaluate(columns.options, row, "options")) if columns.options else None
    if options is not None and not isinstance(options, list):
        raise DataError(f"column options ({columns.options}) gives {type(options).__name__}, expected a list")
    meta = {key: _plain(evaluate(text, row, f"meta.{key}")) for key, text in columns.meta.items()}
    category = _name(evaluate(columns.category, row, "category")) if columns.category else None
    if options:
        meta["options"] = [clean(str(option)) for option in options]
    if category is not None:
        meta.setdefault("category", category)
    pictures = [picture(value, folder) for value in _listed(evaluate(columns.images, row, "images"))]
    target = _target(evaluate(columns.answers, row, "answers")) if columns.answers else None
    values = {
        "question": question,
        "options": meta.get("options", []),
        "category": category,
        "frames": task.frames,
        **meta,
    }
    values["choices"] = lettered(meta.get("options", []))
    values["row"] = row
    text = render(task.prompt, values)
    turns = [Turn("system", task.system)] if task.system else []
    text, pictures = _place_images(text, pictures, task.image_tag)
    cluster = _name(evaluate(columns.cluster, row, "cluster")) if columns.cluster else None
    return Item(name, question, [*turns, Turn("user", text)], pictures, target, meta, cluster, category)


def _place_images(text: str, pictures: list[Picture | Frames], tag: str | None) -> tuple[str, list[Picture | Frames]]:
    """Marks at the tags' places, pictures in the order of their marks; pictures no tag names come first. A tag that
    comes again becomes words, for a picture is shown once."""
    text = clean(text)
    placed: list[Picture | Frames] = []
    rest = list(pictures)
    if tag is not None:
        spots = sorted((text.find(tag.format(k + 1)), k) for k in range(len(pictures)) if tag.format(k + 1) in text)
        for _, k in spots:
            mark = tag.format(k + 1)
            text = text.replace(mark, IMAGE_MARK, 1).replace(mark, f"image {k + 1}")
            placed.append(pictures[k])
            rest.remove(pictures[k])
    counts = [p.count if isinstance(p, Frames) else 1 for p in rest]
    head = IMAGE_MARK * sum(counts)
    return (f"{head}\n{text}" if head else text), rest + placed


def _listed(value: Any) -> list[Any]:
    values = value if isinstance(value, list | tuple) else [value]
    return [entry for entry in values if entry is not None and entry != ""]


def _plain(value: Any) -> Any:
    """A value as JSON stores it; NaN becomes None."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return json.loads(json.dumps(value, default=str))


def _target(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, list):
        value = [entry for entry in value if entry is not None and entry != ""]
    return None if value is None or value == "" or value == [] else value


def _name(value: Any) -> str | None:
    return None if value is None or value != value else str(value)


def data_hash(items: Sequence[Item]) -> str:
    """Twelve hex digits over ids, prompts and targets, in order: which version of the data a number is from."""
    digest = hashlib.sha256()
    for item in items:
        prompt = [turn.content for turn in item.turns]
        digest.update(json.dumps([item.id, prompt, item.target], ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _choose(task: TaskSpec, items: Sequence[Item], limit: int | None, ids: Sequence[str] | None) -> Sequence[Item]:
    if ids is not None:
        wanted = {str(name) for name in ids}
        if unknown := sorted(wanted - {item.id for item in items}):
            raise ConfigError(
                f"{task.name}: no sample with id {', '.join(unknown[:_SHOWN])}; ids look like {items[0].id!r}"
            )
        items = [item for item in items if item.id in wanted]
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1")
    groups: dict[Any, list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault(item.meta.get(task.group, item.id) if task.group else item.id, []).append(position)
    members = list(groups.values())
    wanted_groups = max(1, round(limit * len(members) / len(items)))
    picks = {int((k + 0.5) * len(members) / wanted_groups) for k in range(wanted_groups)}
    return Spool(items[position] for k in sorted(picks) for position in members[k]).settled()


def _refuse_useless(
    task: TaskSpec, items: Sequence[Item], problems: list[Problem], num_rows: int, strict: bool
) -> None:
    if items and not (strict and problems):
        return
    if not problems and not items:
        raise DataError(f"{task.name}: the files hold no sample")
    counts = "; ".join(f"{n} × {kind}" for kind, n in Counter(p.kind for p in problems).items())
    first = problems[0]
    reason = "strict is on" if items else "no sample is usable"
    raise DataError(f"{task.name}: {counts} in {num_rows} rows and {reason}. First, {first.id}: {first.message}")
