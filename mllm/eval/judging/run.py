"""How does one command judge a run's tasks, or prepare a sheet for judging by hand?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mllm import assets
from mllm.errors import ConfigError
from mllm.eval.cache import AnswerCache
from mllm.eval.judging.agreement import read_hand_verdicts, write_sheet
from mllm.eval.judging.judge import FOLDER, judge_predictions, stored_verdicts
from mllm.eval.judging.prompts import load_judge_prompt
from mllm.eval.judging.report import judging_study
from mllm.eval.predictions import header_path, iterate_files
from mllm.eval.studies.study import Study


def run_judge(
    predictions: str | Path,
    judge: str | None,
    *,
    base_url: str | None = None,
    prompt: str | None = None,
    tasks: Sequence[str] | None = None,
    hand: str | Path | None = None,
    sheet: int | None = None,
    cache_path: str | Path | None = None,
    concurrency: int = 8,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> tuple[Study | None, Path]:
    """Judge the tasks of a run (those whose declaration names a judge's prompt, or all with ``prompt``), and sum up all
    verdicts that lie in its folder. Without ``judge`` only the sum is made. sheet: write ``judges/<task>.hand.csv`` with so
    many random answers instead. Returns (study or None, the run's folder). Raises `ConfigError`, `DataError`."""
    place = Path(predictions)
    folder = place.parent if place.is_file() else place
    chosen = _chosen(place, prompt, tasks)
    if sheet is not None:
        for path, task, _ in chosen:
            target = folder / FOLDER / f"{task}.hand.csv"
            target.parent.mkdir(parents=True, exist_ok=True)
            say(f"{write_sheet(path, target, sheet)}: fill in the column verdict (1 right, 0 wrong)")
        return None, folder
    verdicts = read_hand_verdicts(hand) if hand is not None else None
    if judge is not None:
        from mllm.eval.checkpoint import open_generator

        prompts = [(path, load_judge_prompt(name)) for path, _, name in chosen]  # all are read before one is asked
        generator = open_generator(
            judge, kind="openai" if base_url else "hf", batch_size=batch_size, dtype=dtype, device=device,
            base_url=base_url, concurrency=concurrency,
        )  # fmt: skip
        cache = AnswerCache(Path(cache_path)) if cache_path is not None else None
        for path, each in prompts:
            result = judge_predictions(path, generator, each, cache=cache, folder=folder, progress=progress)
            if result.missing:
                say(f"{result.task}: {result.missing} answers are not judged; the same command goes on there")
    found = stored_verdicts(folder)
    if not found:
        raise ConfigError(
            f"{folder}: no verdicts yet; name a judge: --judge MODEL --base-url http://…/v1, or a checkpoint"
        )
    return judging_study(found, verdicts, folder=folder), folder


def _chosen(place: Path, prompt: str | None, tasks: Sequence[str] | None) -> list[tuple[Path, str, str]]:
    """(prediction file, task, prompt's name) of what is to be judged."""
    found, without = [], []
    for path in iterate_files(place) if place.exists() else ():
        task = json.loads(header_path(path).read_text(encoding="utf-8"))["task"]
        if tasks is not None and task["name"] not in tasks:
            continue
        name = prompt or task.get("judge")
        if name is None:
            without.append(task["name"])
        else:
            found.append((path, task["name"], name))
    if not found:
        reason = (
            f"{', '.join(without)} name no judge's prompt" if without else "no finished prediction file of these tasks"
        )
        known = ", ".join(sorted(assets.available("eval/judges")))
        raise ConfigError(f"{place}: {reason}; name one with --prompt ({known}, or a file)")
    return found
