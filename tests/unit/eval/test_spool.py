"""Are totals the same from disk as from memory, and are rows found again in any order?"""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest

from mllm.eval.metrics import build_metric
from mllm.eval.predictions import rows_in_order, write_lines
from mllm.eval.report import columns, results
from mllm.eval.report.results import score_fields, summarise
from mllm.eval.spool import Names, Spool


def test_a_spool_gives_back_what_it_was_given_in_memory_and_from_disk():
    things = [{"id": f"q{k}", "text": "é" * (k % 7), "number": k} for k in range(1300)]
    for kept in (5000, 3):
        spool = Spool(things, kept=kept)
        assert len(spool) == 1300 and list(spool) == things and spool[-1] == things[-1] and spool[5:9] == things[5:9]
        assert (spool.settled() is spool) == (kept == 3)
        with pytest.raises(IndexError):
            spool[1300]
    spool.append({"id": "late"})
    assert spool[1300] == {"id": "late"} and list(spool)[:3] == things[:3], "written after it was read"


def test_what_cannot_be_pickled_stays_in_memory():
    for closures in (2, 6):  # the first things already, or one that comes after the others went to disk
        things = [partial(int, "7")] * (8 - closures) + [lambda: 7] * closures
        spool = Spool(things, kept=3)
        assert [thing() for thing in spool] == [7] * 8 and spool.settled() is not spool


def test_names_are_texts_again():
    names = Names(["a", "", "é/7", "\udcff"])
    assert list(names) == ["a", "", "é/7", "\udcff"] and names[2] == "é/7" and names[1:3] == ["", "é/7"]


def test_rows_come_in_the_order_of_the_ids_whatever_the_files(tmp_path):
    ids = [f"q{k}" for k in range(60)]
    for order in (ids, random.Random(0).sample(ids, 60), ids[:50], [*ids, "another"]):
        write_lines(tmp_path / "t.jsonl", ({"id": name, "n": int(name[1:])} for name in order if name != "another"))
        found = list(rows_in_order(tmp_path / "t.jsonl", Names([*ids[::-1], "unknown"])))
        assert [row["id"] for row in found] == [name for name in ids[::-1] if name in order]
        assert [row["n"] for row in found] == [int(row["id"][1:]) for row in found]


def made_rows(metrics) -> list[dict]:
    draw = random.Random(3)
    rows = []
    for k in range(240):
        row = {
            "id": f"q{k}", "output": draw.choice(["yes", "no", "Yes, it is.", "I cannot tell.", f"maybe {k}"]),
            "target": draw.choice(["yes", "no"]), "cluster": f"c{k // 4}", "category": f"kind {k % 3}", "num_tokens": k % 5,
            "meta": {"category": f"kind {k % 3}", "pair": str(k // 2), "note": k}, "num_prompt_tokens": 9, "logprob": -0.1 * (k % 9),
        }  # fmt: skip
        if k % 50 == 7:
            row["error"] = "lost"
        elif k % 50 == 9:
            row["unusable"] = "no picture"
        rows.append(row | score_fields(row, metrics))
    return rows


@pytest.mark.parametrize("kept", [3, 10**6])
def test_totals_from_disk_are_those_of_plain_arithmetic(kept, monkeypatch):
    """Means, intervals over pairs by bootstrap, categories, counts and facts; with everything on disk and with everything in memory."""
    metrics = [build_metric("pope_official"), build_metric("exact_match"), build_metric("mme")]
    rows = made_rows(metrics)
    whole = summarise(rows, metrics, HEADER)
    monkeypatch.setattr(columns, "_ALIKE", min(kept, 1 << 15))
    monkeypatch.setattr(results, "HELD", min(kept, 50_000))
    found = summarise(iter(rows), metrics, HEADER)
    assert found == whole
    exact = metrics[1].label
    values = [row["scores"][exact]["value"] or 0.0 for row in rows if exact in row["scores"]]
    assert found.metrics[1].value == pytest.approx(100 * sum(values) / len(values)) and len(values) == 235
    assert (found.num_errors, found.num_unusable, len(found.categories)) == (5, 5, 3)
    assert found.metrics[1].num_clusters == 60 and found.facts.tokens == pytest.approx(np.mean([row["num_tokens"] for row in rows
        if not row.get("error") and not row.get("unusable")]))  # fmt: skip
    assert found.metrics[2].low < found.metrics[2].value < found.metrics[2].high


HEADER = {
    "identity": {"task": "t", "version": 1, "data": "d", "generation": {}}, "task": {}, "seconds": 4.0, "answered": 8,
}  # fmt: skip


def test_scores_by_difficulty_as_the_benchmark_the_model_and_other_runs_have_it():
    """Level 2 is right one time in two, level 1 always; the sixty answers are the less sure the later they come; of the other runs
    'all' are right on the first twenty. All worked by hand from these."""
    (metric,) = metrics = [build_metric("exact_match")]
    rows = []
    for k in range(60):
        row = {
            "id": f"q{k}",
            "output": "no" if k % 4 == 3 else "yes",
            "target": "yes",
            "meta": {"difficulty": 1 + k % 2},
            "logprob": -k / 9,
        }
        rows.append(row | score_fields(row, [metric]))
    others = {f"q{k}": "all of 2 other runs right" if k < 20 else "none of 2 other runs right" for k in range(60)}
    found = summarise(rows, metrics, HEADER, others=others).difficulty
    assert [(one.by, one.name, one.value, one.num_samples) for one in found] == [
        ("the benchmark's own level", "1", 100.0, 30), ("the benchmark's own level", "2", 50.0, 30),
        ("how many other runs are right", "all of 2 other runs right", 75.0, 20),
        ("how many other runs are right", "none of 2 other runs right", 75.0, 40),
        ("the model's own probability", "surest third", 75.0, 20), ("the model's own probability", "middle third", 75.0, 20),
        ("the model's own probability", "least sure third", 75.0, 20),
    ]  # fmt: skip
    assert (
        all(one.low < one.value for one in found) and summarise(rows[:20], metrics, HEADER).difficulty[-1].name == "2"
    )
