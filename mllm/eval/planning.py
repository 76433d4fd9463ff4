"""What will an evaluation ask, and about how long will it take, before it starts?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm.eval.asking import times_asked
from mllm.eval.data.loading import load_data
from mllm.eval.predictions import header_path, iterate_files
from mllm.eval.studies.study import number
from mllm.eval.task import TaskSpec


@dataclass(frozen=True)
class TaskPlan:
    """What one task asks. seconds: about, from earlier runs; NaN when none says."""

    task: str
    questions: int
    images: int
    most_tokens: int
    problems: int
    seconds: float


def earlier_rates(places: Sequence[str | Path]) -> dict[str, float]:
    """Seconds of one process per answer of each task in earlier runs' folders (the later folder counts)."""
    found: dict[str, float] = {}
    for place in places:
        for path in iterate_files(Path(place)):
            try:
                header = json.loads(header_path(path).read_text(encoding="utf-8"))
            except ValueError:
                continue
            count = header.get("answered") or header.get("num_items")
            if header.get("seconds") and count:
                found[path.stem] = float(header["seconds"]) / int(count)
    return found


def plan_tasks(
    specs: Sequence[TaskSpec],
    *,
    data: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    earlier: Sequence[str | Path] = (),
    processes: int = 1,
    blind: bool = False,
) -> list[TaskPlan]:
    """Questions, images (frames of videos counted), and the most new tokens of every task, with the time that earlier runs
    lead to expect: their seconds per question, of a task not seen there the mean of all that were; shared by ``processes``. blind:
    with their controls."""
    rates = earlier_rates(earlier)
    usual = sum(rates.values()) / len(rates) if rates else float("nan")
    plans = []
    for spec in specs:
        loaded = load_data(spec, data=data, limit=limit)
        ways = times_asked(spec, blind)
        count, images = ways * len(loaded.items), ways * sum(item.num_images for item in loaded.items)
        seconds = count * rates.get(spec.name, usual) / processes
        plans.append(
            TaskPlan(spec.name, count, images, count * spec.generation.max_new_tokens, len(loaded.problems), seconds)
        )
    return plans


def plan_rows(plans: Sequence[TaskPlan], hour: float | None = None) -> list[tuple[str, ...]]:
    """The plan as rows of text, with their sum. hour: what all processes together cost in an hour, for a last column."""
    total = TaskPlan(
        "all",
        *(
            sum(getattr(plan, name) for plan in plans)
            for name in ("questions", "images", "most_tokens", "problems", "seconds")
        ),
    )
    return [
        (
            p.task, f"{p.questions:,}", f"{p.images:,}", f"{p.most_tokens:,}", str(p.problems), number(p.seconds / 60, 1),
            *([] if hour is None else [number(p.seconds / 3600 * hour, 2)]),
        )
        for p in (*plans, total)
    ]  # fmt: skip


HEADINGS = ("task", "questions", "images", "new tokens, at most", "problems", "minutes, about")
