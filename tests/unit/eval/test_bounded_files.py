"""Commands that read a whole prediction file hold a row of it, not the file."""

from __future__ import annotations

import csv
import json
import tracemalloc

import numpy as np
import pytest

from mllm.eval.harnesses.answer_files import export_answers
from mllm.eval.judging.agreement import write_sheet
from mllm.eval.judging.judge import judge_predictions, stored_verdicts
from mllm.eval.judging.prompts import load_judge_prompt
from mllm.eval.judging.report import judging_study
from mllm.eval.predictions import header_path, prediction_path
from mllm.eval.report.statistics import mean_estimate
from mllm.eval.studies.ablate import routing_by_category
from mllm.eval.studies.arms import ArmsSpec, read_answers
from mllm.eval.task import load_task
from mllm.types import Response

ROWS = 1500
WIDE = "a chart of many things told at length, " * 60  # twice in a row: the file has 7 MB


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = prediction_path(folder, "chartx")
    with path.open("w") as handle:
        for k in range(ROWS):
            row = {
                "id": f"q{k}",
                "question": WIDE,
                "prompt": WIDE,
                "images": [],
                "output": f"{k % 7} ({k})",
                "target": "5",
            }
            row |= {"meta": {}, "cluster": None, "category": "bar" if k % 2 else "pie", "scores": {}}
            row["routing"] = {"clip": 0.25, "dino": 0.75}
            handle.write(json.dumps(row) + "\n")
    identity = {"task": "chartx", "version": 1, "data": "d", "model": "m", "generation": {}, "blind": None}
    header = {
        "identity": identity,
        "task": load_task("chartx").model_dump(mode="json"),
        "metrics": [],
        "source": "official",
    }
    header_path(path).write_text(json.dumps(header))
    return path


class Judge:
    """Says yes of every seventh answer, with many words."""

    name = "judge"

    def fingerprint(self):
        return "judge"

    def generate(self, requests):
        for request in requests:
            yes = "Response: 5 (" in request.turns[-1].content
            yield Response(request.id, ("Yes. " if yes else "No. ") + WIDE, "", 1, 1)


def most(call):
    """(what a call gives, the most that it held at once in MB)."""
    tracemalloc.start()
    try:
        found = call()
        return found, tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_export_sheet_routing_and_arms_hold_no_file(answers, tmp_path):
    assert answers.stat().st_size > 6e6
    spec = ArmsSpec(name="s", description="d", recipe="demo", task="chartx", arms={"a": {"what": "w"}})  # type: ignore[arg-type]
    count, table = most(lambda: export_answers(answers, tmp_path / "theirs.tsv", "vlmevalkit"))
    lines, samples = most(lambda: export_answers(answers, tmp_path / "theirs.jsonl", "lmms-eval"))
    sheet, filling = most(lambda: write_sheet(answers, tmp_path / "sheet.csv", 50))
    routing, told = most(lambda: routing_by_category(answers))
    read, arms = most(lambda: read_answers(spec, answers))
    assert count == lines == ROWS and len(read.ids) == ROWS and sorted(read.ids) == list(read.ids)
    assert routing == {"pie": {"clip": 0.25, "dino": 0.75}, "bar": {"clip": 0.25, "dino": 0.75}}
    with sheet.open(newline="") as handle:
        assert len({row["id"] for row in csv.DictReader(handle)}) == 50
    assert max(table, samples, filling, told, arms) < 2.5, (table, samples, filling, told, arms)


def test_a_judge_holds_neither_answers_nor_replies(answers):
    def judged():
        result = judge_predictions(answers, Judge(), load_judge_prompt("chartx"), progress=False)
        study = judging_study(stored_verdicts(answers.parent), {f"q{k}": float(k % 7 == 5) for k in range(40)})
        return result, study

    mean_estimate([0.0, 1.0], clusters=np.arange(2))  # what numpy imports at its first use is no answer
    (result, study), memory = most(judged)
    assert result.num_verdicts == ROWS and result.missing == 0 and result.unread == {}
    right = sum(k % 7 == 5 for k in range(ROWS))
    assert result.estimate().value == pytest.approx(100 * right / ROWS)
    agreed = next(table for table in study.tables if table.caption == "Agreement").rows[0]
    assert agreed[3:6] == ("40", "100.0", "1.00")
    assert memory < 2.5, memory
