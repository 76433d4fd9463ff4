"""Does the demo's page show scores, the loss, which answers are right, and where the report is?"""

from __future__ import annotations

import json
from types import SimpleNamespace

from PIL import Image

from mllm.cli.demo import REAL, _kinds, _score_line, _scores, picked
from mllm.demo.page import demo_page, loss_curve


def test_the_page_shows_scores_loss_marks_and_links(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    scores = {"charts": {"score": 55.3, "blank": 16.5, "shuffled": 18.0, "prior": 21.2}}
    losses = [{"stage": stage, "step": k, "loss": 4.0 - k} for stage in ("align", "sft") for k in range(3)]
    rows = [
        {"image": tmp_path / "a.png", "question": "<b>?", "answer": "3", "target": "3", "right": True},
        {"image": tmp_path / "a.png", "question": "How many?", "answer": "5", "target": "4", "right": False},
    ]
    page = demo_page(scores, losses, rows, {"every answer": "eval/report.html"})
    for words in ("55.3 %", "16.5 %", "18.0 %", "21.2 %", 'href="eval/report.html"', "✓ 3", "✗ 5", "&lt;b&gt;?"):
        assert words in page
    assert (
        "align" in page
        and "<svg class=chart" in page
        and page.count("data:image/png;base64,") == 2
        and "<b>?" not in page
    )
    assert "no loss" in loss_curve([])
    assert "✗ no words" in demo_page(scores, losses, [{**rows[1], "answer": ""}], {})
    assert "color-scheme:light dark" in page  # links stay readable on a dark page


def test_a_floor_that_was_not_measured_is_never_a_zero():
    result = SimpleNamespace(
        score=0.553, blind=SimpleNamespace(score=0.165), shuffled=None, prior=SimpleNamespace(score=0.0)
    )
    scores = _scores(result)
    assert scores == {"score": 55.3, "blank": 16.5, "shuffled": None, "prior": 0.0}
    told = _score_line("charts", scores)
    assert "shuffled not measured" in told and "not all measured" in told and "at most" not in told
    assert "at most 16.5 %" in _score_line("charts", {**scores, "shuffled": 12.0})
    assert "<td>not measured" in demo_page({"charts": scores}, [], [], {})


def test_each_kind_of_question_stands_beside_what_it_reaches_without_the_right_picture():
    def result(**kinds: float) -> SimpleNamespace:
        return SimpleNamespace(categories=[SimpleNamespace(name=name, value=value) for name, value in kinds.items()])

    seen = result(colour=80.0, count=40.0)
    seen.blind, seen.shuffled, seen.prior = result(colour=10.0, count=41.25), None, result(colour=20.0)
    assert _kinds(seen) == {
        "colour": {"score": 80.0, "blank": 10.0, "shuffled": None, "prior": 20.0},
        "count": {"score": 40.0, "blank": 41.25, "shuffled": None, "prior": None},
    }


def test_the_real_form_shows_twenty_questions_picked_whatever_came_out(tmp_path):
    rows, answers = [], []
    for k in range(40):
        rows.append({"id": f"m-{k}", "image": f"{k}.png", "question": f"How many, {k}?", "answer": "3"})
        value = {"relaxed": {"value": float(k % 4 == 0)}} if k else {}
        answers.append({"id": f"m-{k}", "question": f"How many, {k}?", "output": "3", "target": "3", "scores": value})
    for name, content in (("test.jsonl", rows), ("answers.jsonl", answers)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    result = SimpleNamespace(metrics=[SimpleNamespace(label="relaxed")], path=tmp_path / "answers.jsonl")
    shown = [
        {"image": tmp_path / "3.png", "question": "How many, 3?"},
        {"image": tmp_path / "8.png", "question": "How many, 8?"},
    ]
    found = picked(result, tmp_path, REAL.picked, shown)
    names = [row["image"].name for row in found]
    assert len(shown) + len(found) == 20 and len(set(names)) == 18
    assert not {"0.png", "3.png", "8.png"} & set(names), "without a score, or asked already"
    assert names == [row["image"].name for row in picked(result, tmp_path, 18, shown)] != sorted(names)
    assert all(row["right"] == (int(row["image"].stem) % 4 == 0) for row in found)


def test_letters_in_a_large_picture_are_not_torn_on_the_page(tmp_path):
    for name, side in (("small", 64), ("large", 448)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    row = {"question": "How many?", "answer": "5", "target": "4", "right": False}
    small, large = (
        demo_page({"charts": {"score": 5.0}}, [], [{**row, "image": tmp_path / f"{n}.png"}], {})
        for n in ("small", "large")
    )
    assert "<img class=few src" in small and "<img src" in large


def test_a_cpu_without_units_for_bfloat16_trains_the_real_form_in_float32(monkeypatch):
    import torch

    from mllm.cli.demo import _type_here
    from mllm.recipe import load_recipe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mllm.bfloat16.fast_on_cpu", lambda: False)
    changes = _type_here("real_charts_small")
    assert {stage.dtype for stage in load_recipe("real_charts_small", changes).stages} == {"float32"}
    monkeypatch.setattr("mllm.bfloat16.fast_on_cpu", lambda: True)
    assert _type_here("real_charts_small") == []
