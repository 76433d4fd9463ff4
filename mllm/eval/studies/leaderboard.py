"""How do many checkpoints stand beside each other, and which differences are more than chance?"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mllm.errors import ConfigError
from mllm.eval.predictions import iterate_files, iterate_predictions, rows_in_order, write_atomic
from mllm.eval.report.exports import latex_table
from mllm.eval.report.results import TaskResult
from mllm.eval.report.show import plain_results
from mllm.eval.report.statistics import holm
from mllm.eval.run import rescore
from mllm.eval.spool import Names
from mllm.eval.studies.compare import TaskComparison, compare_predictions
from mllm.eval.studies.study import Study, Table, number, p_text, save_study, spread, study_html

_MOST_PAIRS = 200
_LEVELS = ("all models right", "some right", "no model right")


def named_runs(places: Sequence[str]) -> dict[str, Path]:
    """``name=folder`` entries, or folders named by themselves (by the folder above where that is ``eval``). Raises
    `ConfigError` for a folder that does not exist and for two of one name."""
    runs: dict[str, Path] = {}
    for entry in places:
        name, separator, place = entry.partition("=")
        path = Path(place if separator else entry).expanduser()
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder; expected a run's predictions, as FOLDER or name=FOLDER")
        title = name if separator else (path.parent.name if path.name == "eval" else path.name)
        if title in runs:
            raise ConfigError(f"two runs are called {title!r} ({runs[title]}, {path}); name them: name=FOLDER")
        runs[title] = path
    if len(runs) < 2:
        raise ConfigError("a leaderboard needs at least two runs")
    return runs


def leaderboard(runs: Mapping[str, Path], folder: str | Path, *, seed: int = 0) -> Study:
    """Headlines of every run on the tasks that all of them answered, with intervals; every two runs compared on the same
    samples, p after Holm over all comparisons shown; parts by category and by difficulty. Writes ``leaderboard.html``,
    ``.md``, ``.json`` and ``.tex``.

    Raises `ConfigError` when no task is shared, `DataError` when two runs answered other samples of one.
    """
    files = {name: {path.stem: path for path in iterate_files(place)} for name, place in runs.items()}
    shared = [task for task in next(iter(files.values())) if all(task in found for found in files.values())]
    if not shared:
        listing = "; ".join(f"{name}: {', '.join(found) or 'none'}" for name, found in files.items())
        raise ConfigError(f"no task was answered by all runs ({listing})")
    results = {name: {task: rescore(found[task], write=False) for task in shared} for name, found in files.items()}
    comparisons = _comparisons(files, shared, seed)
    tables = [_ranks(results, shared), _scores(results, shared), _pairs(comparisons)]
    tables += [_difficulty(files, results, shared), _categories(results, shared)]
    left = sorted({task for found in files.values() for task in found} - set(shared))
    notes = [
        f"{len(runs)} runs on {len(shared)} tasks; intervals are 95 %, p after Holm over all {len(comparisons)} comparisons.",
        "Runs are compared on the same samples; two intervals may overlap and the difference still be sure.",
    ]
    notes += [f"not answered by all, left out: {', '.join(left)}"] if left else []
    data = {"runs": {name: str(place) for name, place in runs.items()}}
    data |= {"scores": {name: plain_results(each) for name, each in results.items()}}  # type: ignore[dict-item]
    data |= {"comparisons": [{"a": a, "b": b} | asdict(entry) for a, b, entry in comparisons]}  # type: ignore[dict-item]
    study = Study("leaderboard", "Leaderboard", notes, tables, data)
    folder = Path(folder)
    save_study(study, folder)
    write_atomic(folder / "leaderboard.html", _page(study))
    plain = {name: plain_results(each) for name, each in results.items()}
    write_atomic(folder / "leaderboard.tex", latex_table(plain))
    return study


def _comparisons(
    files: Mapping[str, Mapping[str, Path]], shared: Sequence[str], seed: int
) -> list[tuple[str, str, TaskComparison]]:
    """Every two runs on every task, p adjusted over all of them; with very many runs, each against the first only."""
    pairs = list(itertools.combinations(files, 2))
    if len(pairs) * len(shared) > _MOST_PAIRS:
        first = next(iter(files))
        pairs = [(first, other) for other in files if other != first]
    found = [
        (a, b, compare_predictions(files[a][task], files[b][task], seed=seed)[0]) for a, b in pairs for task in shared
    ]
    adjusted = holm([entry.comparison.p_value for _, _, entry in found])
    return [(a, b, replace(entry, adjusted=p)) for (a, b, entry), p in zip(found, adjusted)]


def _ranks(results: Mapping[str, Mapping[str, TaskResult]], shared: Sequence[str]) -> Table:
    """Mean rank over the tasks; ties share the mean of their ranks."""
    ranks: dict[str, list[float]] = {name: [] for name in results}
    for task in shared:
        values = {name: each[task].metrics[0].value for name, each in results.items()}
        for name, value in values.items():
            above = sum(other > value for other in values.values())
            equal = sum(other == value for other in values.values())
            ranks[name].append(above + (equal + 1) / 2)
    order = sorted(results, key=lambda name: sum(ranks[name]))
    rows = [
        (name, number(sum(ranks[name]) / len(shared)), number(_mean_score(results[name], shared))) for name in order
    ]
    return Table(
        "Runs by mean rank over the tasks", ("run", "mean rank", "mean of headlines in % of their scale"), rows
    )


def _mean_score(each: Mapping[str, TaskResult], shared: Sequence[str]) -> float:
    return sum(100 * each[task].score for task in shared) / len(shared)


def _scores(results: Mapping[str, Mapping[str, TaskResult]], shared: Sequence[str]) -> Table:
    rows = []
    for task in shared:
        for name, each in results.items():
            metric = each[task].metrics[0]
            sure = spread(metric.low, metric.high)
            cost = _cost(each[task])
            rows.append(
                (
                    task,
                    name,
                    metric.label,
                    number(metric.value),
                    sure,
                    str(metric.num_scored),
                    str(metric.num_unparsed),
                    *cost,
                )
            )
    headings = ("task", "run", "rule", "score", "95 %", "n", "unparsed", "tokens", "ms", "declined %", "ECE %")
    return Table("Scores (tokens and milliseconds per answer; ECE: calibration error)", headings, rows, 3)


def _cost(result: TaskResult) -> tuple[str, ...]:
    facts = result.facts
    costs = (facts.tokens, 1), (facts.milliseconds, 0)
    shares = (facts.refused, 1), (facts.calibration_error, 1)
    return (
        *("–" if value is None else number(value, digits) for value, digits in costs),
        *("–" if share is None else number(100 * share, digits) for share, digits in shares),
    )


def _pairs(comparisons: Sequence[tuple[str, str, TaskComparison]]) -> Table:
    rows = []
    for a, b, entry in comparisons:
        found = entry.comparison
        sure = spread(found.low, found.high, sign=True)
        counts = f"{found.wins}/{found.losses}" if found.wins or found.losses else "–"
        rows.append(
            (entry.task, a, b, f"{found.difference:+.2f}", sure, p_text(found.p_value), p_text(entry.adjusted), counts)
        )
    headings = ("task", "A", "B", "B − A", "95 %", "p", "p (Holm)", "B better/worse")
    return Table("Every two runs on the same samples", headings, rows, 3)


def _difficulty(
    files: Mapping[str, Mapping[str, Path]], results: Mapping[str, Mapping[str, TaskResult]], shared: Sequence[str]
) -> Table:
    """How many samples all runs, some, or none have right, and each run's score on those that divide the runs."""
    rows = []
    for task in shared:
        label = next(iter(results.values()))[task].metrics[0].label
        ids = Names(row["id"] for row in iterate_predictions(next(iter(files.values()))[task]))
        values = {name: _headlines(found[task], ids, label) for name, found in files.items()}
        share = np.sum([each >= 0.5 for each in values.values()], axis=0)
        divided = (share > 0) & (share < len(values))
        levels = (int((share == len(values)).sum()), int(divided.sum()), int((share == 0).sum()))
        for name, each in values.items():
            value = 100 * float(each[divided].mean()) if divided.any() else float("nan")
            rows.append((task, name, *map(str, levels), number(value)))
    headings = ("task", "run", *_LEVELS, "score on the divided %")
    return Table("By difficulty: samples that divide the runs", headings, rows, 2)


def _headlines(path: Path, ids: Sequence[str], label: str) -> np.ndarray:
    """``(n,)`` float64: one rule's scores of these samples; 0 where it read or scored nothing."""
    rows = rows_in_order(path, ids)
    return np.fromiter((row["scores"].get(label, {}).get("value") or 0.0 for row in rows), dtype=float, count=len(ids))


def _categories(results: Mapping[str, Mapping[str, TaskResult]], shared: Sequence[str]) -> Table:
    rows = []
    for task in shared:
        parts = [key for key in next(iter(results.values()))[task].metrics[0].details if key != "score"]
        for part in parts:
            values = [each[task].metrics[0].details.get(part, float("nan")) for each in results.values()]
            rows.append((task, part, *map(number, values)))
    return Table("By category", ("task", "part", *results), rows, 2)


def _page(study: Study) -> str:
    """One HTML page without anything from outside; tables sort by a click on a heading."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;color-scheme:light dark}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.25em .7em;border-bottom:1px solid #8884;"
        "text-align:left}.n{text-align:right;font-variant-numeric:tabular-nums}th{cursor:pointer}.note{opacity:.75}"
    )
    script = (
        "document.querySelectorAll('th').forEach(h=>h.onclick=()=>{const t=h.closest('table'),k=[...h.parentNode.children]"
        ".indexOf(h),b=t.tBodies[0],r=[...b.rows].slice(1),d=h.dataset.d=h.dataset.d=='1'?'-1':'1',v=x=>{const c=x.cells[k]"
        ".textContent,n=parseFloat(c.replace('−','-'));return isNaN(n)?c:n};r.sort((p,q)=>(v(p)>v(q)?1:v(p)<v(q)?-1:0)*d)"
        ".forEach(x=>b.append(x))})"
    )
    title = html.escape(study.title)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
        f"<style>{style}</style>{study_html(study)}<script>{script}</script></html>\n"
    )
