"""What would be scored without looking: with another sample's pictures, or by always giving the commonest answer?"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm.errors import DataError
from mllm.eval.data.loading import Item, TaskData
from mllm.eval.data.pictures import Frames
from mllm.eval.metrics import Metric
from mllm.eval.metrics.text import references
from mllm.eval.report.results import Row, score_fields
from mllm.eval.spool import Spool
from mllm.eval.task import TaskSpec, data_folder

_KIND_WORDS = 3
_ENOUGH = 5
"""So many training answers make a question a kind of its own."""


def shuffled(items: Sequence[Item]) -> Sequence[Item]:
    """The items, each with the pictures of another one: as many, and of another cluster (picture, scene) where there is
    one. The same for every process and every run. Items without pictures, and those that no other could lend any, are
    left out."""
    shapes: dict[tuple[Any, ...], list[tuple[str, str, int]]] = {}  # (cluster, id, position) of each
    for position, item in enumerate(items):
        if item.pictures:
            shape = tuple(source.count if isinstance(source, Frames) else 0 for source in item.pictures)
            shapes.setdefault(shape, []).append((_cluster(item), item.id, position))
    donors: dict[int, int] = {}
    for group in shapes.values():
        clusters = Counter(cluster for cluster, _, _ in group)
        order = sorted(group, key=lambda one: (_digest(one[0]), one[1]))
        step = max(clusters.values())  # further than any cluster reaches, so that nobody meets his own
        for place, (cluster, _, position) in enumerate(order):
            donor = order[(place + step) % len(order)]
            if donor[0] != cluster:
                donors[position] = donor[2]
    given = (
        replace(item, pictures=items[donors[position]].pictures)
        for position, item in enumerate(items)
        if position in donors
    )
    return Spool(given).settled()


def _cluster(item: Item) -> str:
    return item.id if item.cluster is None else item.cluster


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prior_rows(
    data: TaskData, metrics: Sequence[Metric], place: Mapping[str, str | Path] | None
) -> tuple[Sequence[Row], str]:
    """(rows as if every question had got the commonest answer of its kind, where these answers are counted).

    They are counted in the training split that the task names (``train``), where its file is there; else in the
    benchmark itself, which can only flatter the prior.
    """
    known = _training_answers(data.task, place)
    origin = f"the training split ({known[1]})" if known else "the benchmark itself, no training split is at hand"
    counts = known[0] if known else _own_answers(data.items)
    rows = Spool[Row]()
    for item in data.items:
        kind = next((kind for kind in _kinds(item.question, item.category) if sum(counts.get(kind, {}).values())), None)
        answer = counts[kind].most_common(1)[0][0] if kind else ""
        row: Row = {
            "id": item.id, "question": item.question, "prompt": "", "images": [], "output": answer, "target": item.target,
            "meta": item.meta, "cluster": item.cluster, "category": item.category, "num_prompt_tokens": 0, "num_tokens": 0,
            "key": "",
        }  # fmt: skip
        rows.append(row | score_fields(row, metrics))
    return rows, origin


def _kinds(question: str, category: str | None) -> list[str]:
    """What a question may be counted under, the narrowest first: itself, its category, how it begins, any."""
    words = question.split()
    begins = [f"begins {' '.join(words[:_KIND_WORDS]).lower()}"]
    return [f"asks {' '.join(words)}", *([f"is {category}"] if category else begins), *begins, "any"]


def _own_answers(items: Sequence[Item]) -> dict[str, Counter[str]]:
    """Answers by category; by how the questions begin where there are no categories."""
    counts: dict[str, Counter[str]] = {}
    for item in items:
        if item.target is None:
            continue
        kind = _kinds(item.question, item.category)[1]
        try:
            counts.setdefault(kind, Counter()).update(references(item.target))
        except DataError:
            continue
    return counts


def _training_answers(
    task: TaskSpec, place: Mapping[str, str | Path] | None
) -> tuple[dict[str, Counter[str]], str] | None:
    folder = data_folder(task, place)
    if task.train is None or folder is None or not folder.is_dir() or not (folder / task.train).is_file():
        return None
    counts: dict[str, Counter[str]] = {}
    for line in (folder / task.train).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_turn, bare = row.get("kinds") or [], row.get("answers") or []  # one per question of a conversation
        for turn, (question, replied) in enumerate(_exchanges(row)):
            answer = bare[turn] if turn < len(bare) else replied  # without what led to it
            for kind in _kinds(question, by_turn[turn] if turn < len(by_turn) else row.get("kind")):
                counts.setdefault(kind, Counter())[answer] += 1
    seldom = [kind for kind, answers in counts.items() if kind.startswith("asks ") and answers.total() < _ENOUGH]
    for kind in seldom:
        del counts[kind]
    return counts, task.train


def _exchanges(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions and answers of one training row: its conversation, or its columns."""
    if "messages" not in row:
        return [(str(row["question"]), str(row["answer"]))] if "question" in row and "answer" in row else []
    messages = [(message["role"], _words(message["content"])) for message in row["messages"]]
    return [
        (question, replied)
        for (one, question), (two, replied) in itertools.pairwise(messages)
        if one == "user" and two == "assistant"
    ]


def _words(content: Any) -> str:
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return " ".join(" ".join(parts).split())
