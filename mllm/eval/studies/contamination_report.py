"""How are training data compared with benchmarks, and scores shown with and without what they share?"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, MllmError
from mllm.eval.data.loading import TaskData, load_data
from mllm.eval.predictions import header_path, prediction_path
from mllm.eval.progress import Progress
from mllm.eval.studies.contamination import (
    CleanScore,
    Overlap,
    OverlapFinder,
    picture_hashes,
    scores_without,
    training_samples,
)
from mllm.eval.studies.study import Study, Table, number, save_study
from mllm.eval.task import expand_tasks, load_task

_SHOWN = 20
_AHEAD = 64


@dataclass
class TrainingRead:
    """What was read of the training data: rows by dataset, and what could not be read."""

    rows: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def training_sources(names: Sequence[str]) -> list[Any]:
    """Sources of samples that ``names`` mean, each once: mixtures, datasets (names or YAML), json or jsonl files, and
    checkpoint folders (the data of every stage of their ``recipe.yaml``). Raises `ConfigError` or `UnknownName`."""
    from mllm.data.lookup import load_mixture
    from mllm.data.recognise import recognise
    from mllm.data.sources import open_source
    from mllm.data.spec import DatasetSpec

    specs: list[DatasetSpec] = []
    for name in names:
        place = Path(name)
        if place.suffix in (".json", ".jsonl"):
            if not place.is_file():
                raise ConfigError(f"--train {name}: no such file")
            specs.append(recognise(place))
            continue
        declared: list[Any] = [name]
        if place.is_dir():
            if not (place / "recipe.yaml").is_file():
                raise ConfigError(
                    f"--train {name}: a folder without recipe.yaml; name a mixture, a dataset, a json/jsonl file or a "
                    "checkpoint trained by this toolkit"
                )
            from mllm.recipe import load_recipe

            recipe = load_recipe(str(place / "recipe.yaml"), trusted=False)
            declared = [stage.data for stage in recipe.stages if stage.data]
        for data in declared:
            specs += [item.dataset for item in load_mixture(data).datasets if isinstance(item.dataset, DatasetSpec)]
    unique = {repr(spec.model_dump()): spec for spec in specs}
    return [open_source(spec) for spec in unique.values()]


def read_training(
    finder: OverlapFinder,
    sources: Sequence[Any],
    *,
    limit: int | None = None,
    threads: int = 4,
    progress: bool = True,
) -> TrainingRead:
    """Show every training sample to ``finder``. limit: rows per dataset. Rows and pictures that cannot be read are
    named and counted; their words are compared all the same."""
    read = TrainingRead()
    for source in sources:
        total = min(len(source), limit) if limit else len(source)
        read.rows[source.name] = total
        with Progress(f"training data {source.name}", total, shown=progress) as bar:
            for name, text, hashes, problem in _hashed(source, total, threads, finder.wants_pictures):
                finder.meet(name, text, hashes)
                if problem:
                    read.problems.append(problem)
                bar.advance()
    return read


def _hashed(
    source: Any, total: int, threads: int, pictures: bool
) -> Iterator[tuple[str, str, list[int | None], str | None]]:
    """(id, text, hashes, problem) of every row, pictures decoded in threads."""

    def look(row: int) -> tuple[str, str, list[int | None], str | None]:
        try:
            sample = source[row]
        except MllmError as error:
            return f"{source.name} row {row}", "", [], str(error)
        _, text, images = next(training_samples([sample]))
        name = f"{source.name}: {sample.id}"
        try:
            return name, text, picture_hashes(name, images) if pictures else [], None
        except MllmError as error:
            return name, text, [], str(error)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: deque[Future[tuple[str, str, list[int | None], str | None]]] = deque()
        rows = iter(range(total))
        while True:
            while len(waiting) < _AHEAD and (row := next(rows, None)) is not None:
                waiting.append(pool.submit(look, row))
            if not waiting:
                return
            yield waiting.popleft().result()


def run_contamination(
    train: Sequence[str],
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    data: Mapping[str, str | Path] | None = None,
    scores: str | Path | None = None,
    max_distance: int = 4,
    ngram: int = 8,
    min_share: float = 0.5,
    images: bool = True,
    limit: int | None = None,
    threads: int = 4,
    progress: bool = True,
) -> Study:
    """Compare training data with benchmarks in one pass; ``contamination.json`` (every overlap) and
    ``contamination.md`` go to ``output_dir``. scores: a folder of predictions, scored with and without the overlaps."""
    loaded = [load_data(load_task(name), data=data) for name in expand_tasks(tasks)]
    sources = training_sources(train)
    finder = OverlapFinder(loaded, max_distance=max_distance, ngram=ngram, min_share=min_share, images=images)
    read = read_training(finder, sources, limit=limit, threads=threads, progress=progress)
    found = finder.overlaps()
    clean: dict[str, dict[str, list[CleanScore]]] = {}
    for entry in loaded:
        name = entry.task.name
        path = prediction_path(Path(scores), name) if scores is not None else None
        if path is not None and path.exists() and header_path(path).exists():
            clean[name] = {
                kind: scores_without(path, ids, entry.task.metrics) for kind, ids in _met(found[name]).items() if ids
            }
    limits = {"max_distance": max_distance, "ngram": ngram, "min_share": min_share, "images": images, "limit": limit}
    study = contamination_study(loaded, found, read, clean, limits)
    save_study(study, output_dir)
    return study


def _met(overlaps: Sequence[Overlap]) -> dict[str, set[str]]:
    """What counts as an overlap → ids."""
    pictures, questions = ({o.id for o in overlaps if o.kind == kind} for kind in ("image", "text"))
    return {"picture": pictures, "question": questions, "both": pictures & questions, "either": pictures | questions}


def contamination_study(
    tasks: Sequence[TaskData],
    found: Mapping[str, Sequence[Overlap]],
    read: TrainingRead,
    clean: Mapping[str, Mapping[str, Sequence[CleanScore]]],
    limits: Mapping[str, Any],
) -> Study:
    """The comparison as tables: overlaps by kind, scores with and without, the first overlaps by name."""
    trained = ", ".join(f"{name} ({rows} rows)" for name, rows in read.rows.items())
    notes = [
        f"Training data: {trained}.",
        f"image: perceptual hashes differ in at most {limits['max_distance']} of 64 bits. text: at least "
        f"{100 * limits['min_share']:.0f} % of the question's {limits['ngram']}-grams stand in one training text.",
        "A hit is a candidate to look at: pictures of one kind (charts, forms) may hash alike, and questions from one "
        "template share their words.",
    ]
    if read.problems:
        notes.append(f"{len(read.problems)} training rows or pictures could not be read, first: {read.problems[0]}")
    rows = []
    for data in tasks:
        size = len(data.items)
        shares = [f"{len(ids)} ({100 * len(ids) / size:.1f} %)" for ids in _met(found[data.task.name]).values()]
        rows.append((data.task.name, str(size), *shares))
    headings = ("task", "samples", "picture seen", "question seen", "both", "either")
    tables = [Table("Benchmark samples met in training", headings, rows)]
    if clean:
        shown = [
            (
                task, s.metric.removesuffix(" v1"), kind, number(s.all_samples), number(s.without), number(s.only),
                str(s.num_samples), str(s.num_overlapping),
            )
            for task, kinds in clean.items()
            for kind, entries in kinds.items()
            for s in entries
        ]  # fmt: skip
        headings = ("task", "metric", "seen", "all", "without overlaps", "overlaps only", "n", "overlapping")
        tables.append(Table("Scores with and without the overlaps", headings, shown, 3))
    examples = [
        (
            task,
            o.id,
            o.kind,
            o.training_id,
            f"{o.measure:.0f} bits" if o.kind == "image" else f"{100 * o.measure:.0f} %",
        )
        for task, overlaps in found.items()
        for o in sorted(overlaps, key=lambda o: (o.kind != "image", o.measure if o.kind == "image" else 1 - o.measure))[
            :_SHOWN
        ]
    ]
    if examples:
        headings = ("task", "sample", "kind", "training sample", "nearness")
        tables.append(Table(f"Nearest overlaps (at most {_SHOWN} a task; all are in the JSON)", headings, examples, 4))
    everything = {
        "limits": dict(limits),
        "training": asdict(read),
        "overlaps": {task: [asdict(o) for o in overlaps] for task, overlaps in found.items()},
        "scores": {
            task: {kind: [asdict(s) for s in entries] for kind, entries in kinds.items()}
            for task, kinds in clean.items()
        },
    }
    return Study("contamination", "Contamination", notes, tables, everything)
