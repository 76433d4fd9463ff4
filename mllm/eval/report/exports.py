"""How do scores leave the harness: CSV, LaTeX, a model card's ``model-index``?"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mllm.errors import DataError
from mllm.models.model_index import model_index

FORMS = ("csv", "latex", "model-index", "json")
_FIELDS = (
    "task",
    "metric",
    "part",
    "value",
    "unit",
    "standard_error",
    "low",
    "high",
    "n",
    "unparsed",
    "limited",
    "protocol",
)


def read_results(folder: str | Path) -> dict[str, Any]:
    """``results.json`` of a run. Raises `DataError`."""
    path = Path(folder) / "results.json" if Path(folder).is_dir() else Path(folder)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no results can be read from it ({error}); `mllm eval report` writes it") from None
    return results


def export_results(results: Mapping[str, Any], form: str, *, name: str = "model") -> str:
    """Scores as text in one of `FORMS`. name: the model's, for LaTeX and the model card."""
    if form == "csv":
        return csv_text(results)
    if form == "latex":
        return latex_table({name: results})
    if form == "model-index":
        return yaml.safe_dump({"model-index": model_index(results, name)}, sort_keys=False, allow_unicode=True)
    return json.dumps(dict(results), indent=2, ensure_ascii=False) + "\n"


def csv_text(results: Mapping[str, Any]) -> str:
    """One row a metric and part: headlines (``part`` empty) with their interval, then every category."""
    out = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(out, list[str](_FIELDS), lineterminator="\n")
    writer.writeheader()
    for task, result in results["tasks"].items():
        for metric in result["metrics"]:
            row: dict[str, Any] = {
                "task": task, "metric": metric["label"], "part": "", "value": metric["value"], "unit": metric["unit"],
                "standard_error": metric["standard_error"], "low": metric["low"], "high": metric["high"], "n": metric["num_scored"],
                "unparsed": metric["num_unparsed"], "limited": bool(result["header"].get("limited")), "protocol": result["protocol"],
            }  # fmt: skip
            writer.writerow(row)
            for part, value in metric["details"].items():
                if part != "score":
                    writer.writerow(
                        {"task": task, "metric": metric["label"], "part": part, "value": value, "unit": metric["unit"]}
                    )
    return out.getvalue()


def latex_table(models: Mapping[str, Mapping[str, Any]], *, best: bool = True) -> str:
    """A table with a row a model and a column a task (booktabs): headline and half the 95 % interval; the highest of each column
    bold. A part of a benchmark is marked by a dagger."""
    tasks = list(dict.fromkeys(task for results in models.values() for task in results["tasks"]))
    lines = [f"\\begin{{tabular}}{{l{'r' * len(tasks)}}}", "\\toprule"]
    lines.append(" & ".join(["model", *map(_escaped, tasks)]) + " \\\\")
    lines.append("\\midrule")
    highest = {task: max(_values(models, task), default=None) for task in tasks}
    for name, results in models.items():
        cells = [_escaped(name)]
        for task in tasks:
            result = results["tasks"].get(task)
            if result is None or result["metrics"][0]["value"] is None:
                cells.append("--")
                continue
            metric = result["metrics"][0]
            value = f"{metric['value']:.1f}"
            if best and len(models) > 1 and metric["value"] == highest[task]:
                value = f"\\textbf{{{value}}}"
            half = (
                "" if metric["low"] is None else f" {{\\scriptsize $\\pm${(metric['high'] - metric['low']) / 2:.1f}}}"
            )
            dagger = "$^\\dagger$" if result["header"].get("limited") else ""
            cells.append(f"{value}{half}{dagger}")
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _values(models: Mapping[str, Mapping[str, Any]], task: str) -> Sequence[float]:
    found = (results["tasks"][task]["metrics"][0]["value"] for results in models.values() if task in results["tasks"])
    return [value for value in found if value is not None]


def _escaped(text: str) -> str:
    for mark in ("\\", "_", "&", "%", "#", "$", "{", "}"):
        text = text.replace(mark, "\\textbackslash " if mark == "\\" else f"\\{mark}")
    return text
