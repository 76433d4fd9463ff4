"""How are results shown: a console table, Markdown, one HTML page with pictures?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mllm.eval.predictions import iterate_predictions, write_atomic
from mllm.eval.report.page import (
    DIFFICULTY_HEADINGS,
    difficulty_rows,
    facts_table,
    floor_note,
    html_pages,
    limited_note,
)
from mllm.eval.report.results import MetricResult, TaskResult
from mllm.eval.report.samples import Listing, list_samples
from mllm.eval.studies.compare import TaskComparison, compare_predictions
from mllm.eval.studies.study import (
    Study,
    finite,
    load_studies,
    markdown_table,
    number,
    p_text,
    print_table,
    study_markdown,
)

_COMPARED = ("task", "metric", "A", "B", "B − A", "95 %", "p", "p (Holm)", "B better/worse", "method")


def write_report(
    results: Mapping[str, TaskResult],
    folder: str | Path,
    *,
    batch_differences: Sequence[Mapping[str, Any]] | None = None,
    show: bool = True,
) -> dict[str, Path]:
    """Write ``report.md``, ``report.html`` and ``results.json`` into ``folder`` and print the table. Returns their
    paths. Studies whose files lie in the folder (ablation, stress test, contamination) become chapters. With many samples they
    stand on pages of their own below ``report/``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in ("report.md", "report.html", "results.json")}
    studies = load_studies(folder)
    write_atomic(paths["report.md"], markdown(results, batch_differences, studies))
    _write_pages(results, folder, studies)
    write_atomic(
        paths["results.json"],
        json.dumps(plain_results(results, batch_differences), indent=2, ensure_ascii=False) + "\n",
    )
    if show:
        print_results(results, batch_differences)
    return paths


def _write_pages(results: Mapping[str, TaskResult], folder: Path, studies: Sequence[Study]) -> None:
    """``report.html``, and pages below ``report/`` where there are many samples; pages of an earlier report go."""

    def listing(name: str) -> Listing:
        result = results[name]
        blind = [] if result.blind is None else iterate_predictions(Path(result.blind.path))
        return list_samples(result, iterate_predictions(Path(result.path)), blind, folder / "thumbnails")

    for path in (folder / "report").glob("*.html"):
        path.unlink()
    for name, page in html_pages(results, listing, folder / "thumbnails", studies):
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomic(folder / name, page)


def plain_results(
    results: Mapping[str, TaskResult], batch_differences: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Results as JSON-ready data; NaN and infinities become null."""
    tasks = {
        name: asdict(result) | {"score": result.score, "protocol": result.protocol} for name, result in results.items()
    }
    document: dict[str, Any] = {"tasks": tasks}
    if batch_differences is not None:
        document["batch_differences"] = list(batch_differences)
    return finite(document)


def interval(metric: MetricResult) -> str:
    """``low – high`` of the 95 % interval."""
    return "–" if metric.low != metric.low else f"{metric.low:.1f} – {metric.high:.1f}"


_HEADINGS = ("task", "metric", "score", "± SE", "95 %", "blind", "n", "unparsed", "clusters")


def _table_rows(results: Mapping[str, TaskResult]) -> list[tuple[str, ...]]:
    rows = []
    for name, result in results.items():
        for position, metric in enumerate(result.metrics):
            blind = result.blind.metrics[position].value if result.blind is not None else float("nan")
            title = name if position == 0 else ""
            label, score = metric.label.removesuffix(" v1"), f"{number(metric.value)} {metric.unit}".strip()
            clusters = "–" if metric.num_clusters is None else str(metric.num_clusters)
            counts = str(metric.num_scored), str(metric.num_unparsed), clusters
            sure = number(metric.standard_error), interval(metric)
            rows.append((title, label, score, *sure, number(blind), *counts))
    return rows


def _notes(results: Mapping[str, TaskResult]) -> list[str]:
    notes = []
    for name, result in results.items():
        notes.append(result.protocol)
        notes.extend(f"{name}: {note}" for note in floor_note(result))
        notes.extend(f"{name}: {problem}" for problem in result.problems)
        notes.extend(f"{name}: {note}" for note in limited_note(result))
        if note := result.header.get("task", {}).get("note"):
            notes.append(f"{name}: {note}")
        notes.extend(
            f"{name}: {pair.replace(' | ', ' and ')} disagree on {count} samples"
            for pair, count in result.disagreements.items()
            if count
        )
    return notes


def _batch_note(differences: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if differences is None:
        return []
    if not differences:
        return ["batch check: the same answers alone and in batches"]
    first = differences[0]
    return [
        f"batch check: {len(differences)} answers differ between alone and batched, first {first['task']} "
        f"{first['id']} at batch size {first['batch_size']}: {first['alone']!r} alone, {first['batched']!r} batched"
    ]


def console_lines(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """The table as lines, of at most ``width`` characters where that can be; names are never broken. Task and metric
    stand beside the numbers; in a narrower terminal the task, then the metric too, stand above them, and columns
    without any number are left out."""
    columns = list(range(2, len(_HEADINGS)))

    def numbers(cells: Sequence[str]) -> str:
        return "  ".join(cells[k].rjust(max(len(row[k]) for row in (_HEADINGS, *rows))) for k in columns)

    tasks, metrics = (max(len(row[k]) for row in (_HEADINGS, *rows)) for k in (0, 1))
    whole = [f"{row[0]:{tasks}}  {row[1]:{metrics}}  {numbers(row)}" for row in (_HEADINGS, *rows)]
    if len(whole[0]) <= width:
        return whole
    columns = [k for k in columns if any(row[k] != "–" for row in rows)]
    beside = 2 + metrics + 2 + len(numbers(_HEADINGS)) <= width
    lines = [f"{_HEADINGS[0]:{metrics + 2}}  {numbers(_HEADINGS)}" if beside else numbers(_HEADINGS).rjust(width)]
    for row in rows:
        lines += [row[0]] if row[0] else []
        lines += [f"  {row[1]:{metrics}}  {numbers(row)}"] if beside else [f"  {row[1]}", numbers(row).rjust(width)]
    return lines


def print_results(
    results: Mapping[str, TaskResult],
    batch_differences: Sequence[Mapping[str, Any]] | None = None,
    console: Console | None = None,
) -> None:
    """The table and its notes on the console."""
    console = console or Console()
    head, *lines = console_lines(_table_rows(results), console.width)
    console.print(f"[bold]{escape(head)}[/]", highlight=False, soft_wrap=True)
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)
    for note in [*_notes(results), *_batch_note(batch_differences)]:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)


def markdown(
    results: Mapping[str, TaskResult],
    batch_differences: Sequence[Mapping[str, Any]] | None = None,
    studies: Sequence[Study] = (),
) -> str:
    """The report as Markdown: table, per-category numbers, protocols, studies."""
    lines = ["# Evaluation", "", *markdown_table(_HEADINGS, _table_rows(results)), ""]
    lines += [f"- {note}" for note in [*_notes(results), *_batch_note(batch_differences)]]
    headings, facts = facts_table(results, studies)
    lines += ["", *markdown_table(headings, facts)] if headings else []
    for name, result in results.items():
        lines += ["", f"## {name}", ""]
        for metric in result.metrics:
            lines += [f"**{metric.label}**: {metric.protocol}. Interval: {metric.method}.", ""]
            details = {key: value for key, value in metric.details.items() if key != "score"}
            if details:
                lines += [
                    *markdown_table(("part", metric.unit or "value"), [(k, number(v)) for k, v in details.items()]),
                    "",
                ]
        if result.difficulty:
            lines += [*markdown_table(DIFFICULTY_HEADINGS, difficulty_rows(result)), ""]
    for study in studies:
        lines += ["", *study_markdown(study, level=2)]
    return "\n".join(lines).rstrip() + "\n"


def compare(first: str | Path, second: str | Path, *, seed: int = 0, show: bool = True) -> list[TaskComparison]:
    """Compare two runs on matched samples and print the table. See `compare_predictions`."""
    comparisons = compare_predictions(first, second, seed=seed)
    if show:
        rows = []
        for entry in comparisons:
            result = entry.comparison
            counts = f"{result.wins}/{result.losses}" if result.wins or result.losses else "–"
            rows.append(
                (
                    entry.task, entry.metric, number(entry.value_a), number(entry.value_b), number(result.difference),
                    "–" if result.low != result.low else f"{result.low:.2f} – {result.high:.2f}",
                    p_text(result.p_value), p_text(entry.adjusted), counts, result.method,
                )
            )  # fmt: skip
        print_table(Console(), _COMPARED, rows, (0, 1, len(_COMPARED) - 1))
    return comparisons
