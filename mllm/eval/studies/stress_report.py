"""How is the text-only stress test run over benchmarks, kept and shown?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mllm.eval.data.loading import load_data
from mllm.eval.predictions import header_path, prediction_path
from mllm.eval.studies.contamination import CleanScore, scores_without
from mllm.eval.studies.stress import StressResult, stress_test
from mllm.eval.studies.study import Study, Table, number, save_study, spread
from mllm.eval.task import expand_tasks, load_task

NOTES = (
    "A random forest that sees question and options but no picture, trained and tested by k-fold on the benchmark "
    "itself (arXiv 2511.04655). What it answers, no picture was needed for.",
    "It learns the benchmark's habits from other folds, which a model tested once cannot: it bounds how much the words "
    "give away, it is not a score to beat.",
)


def run_stress(
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    data: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    folds: int = 5,
    trees: int = 200,
    seed: int = 0,
    scores: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Study:
    """Stress-test benchmarks; ``stress.json`` and ``stress.md`` go to ``output_dir``.

    scores: a folder of predictions; each task's headline is then also given on the samples that words alone answer and
    on the others. Raises `DataError` for a benchmark with too few scored samples.
    """
    results: list[StressResult] = []
    split: dict[str, CleanScore] = {}
    for name in expand_tasks(tasks):
        if say is not None:
            say(f"{name}: {folds} folds of {trees} trees")
        task = load_task(name)
        result = stress_test(load_data(task, data=data, limit=limit), folds=folds, trees=trees, seed=seed)
        results.append(result)
        path = prediction_path(Path(scores), name) if scores is not None else None
        if path is not None and path.exists() and header_path(path).exists():
            split[name] = scores_without(path, set(result.answered), task.metrics[:1])[0]
    study = stress_study(results, split)
    save_study(study, output_dir)
    return study


def stress_study(results: Sequence[StressResult], split: Mapping[str, CleanScore] | None = None) -> Study:
    """The stress test as tables. split: task → headline with and without the samples that words alone answer."""
    rows = [
        (
            r.task, r.kind, f"{100 * r.accuracy.value:.1f} %", spread(100 * r.accuracy.low, 100 * r.accuracy.high, digits=1),
            f"{100 * r.chance:.1f} %" if r.kind == "choice" else "–", f"{100 * r.majority:.1f} %", str(r.num_samples),
            str(r.num_left_out),
        )
        for r in results
    ]  # fmt: skip
    headings = ("task", "questions", "from words alone", "95 %", "chance", "commonest answer", "n", "left out")
    tables = [Table("Answered without seeing", headings, rows, 2)]
    if split:
        shown = [
            (task, s.metric.removesuffix(" v1"), number(s.all_samples), number(s.without), number(s.only),
             str(s.num_samples), str(s.num_overlapping))
            for task, s in split.items()
        ]  # fmt: skip
        caption = "The model's score, split by whether words alone answer the question"
        headings = ("task", "metric", "all", "needs seeing", "words suffice", "n", "of which words suffice")
        tables.append(Table(caption, headings, shown, 2))
    data = {"results": [asdict(r) for r in results], "split": {task: asdict(s) for task, s in (split or {}).items()}}
    return Study("stress", "Text-only stress test", list(NOTES), tables, data)
