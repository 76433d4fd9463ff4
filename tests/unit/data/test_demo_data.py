"""Are the demo's charts right, balanced, held out, reproducible and legible to a pixel counter?"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image, ImageColor

from mllm.data.check import check
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.demo.charts import ANSWER_TYPES, COLOURS, KINDS, Chart, Renderer, caption, questions
from mllm.demo.charts_and_digits import DIGIT_QUESTIONS, prepare_demo, train_tokenizer
from mllm.demo.tables import draw_chart, real_tables


def answers(chart: Chart) -> dict[str, str]:
    return {q.text: q.answer for found in questions(chart).values() for q in found}


def test_questions_about_a_known_bar_chart():
    chart = Chart("bar", ("red", "blue", "green"), (3, 9, 3), ("A", "B", "C"))
    found = answers(chart)
    assert found["How many bars are there?"] == "3"
    assert found["What colour is the bar named C?"] == "green"
    assert found["Which colour is the tallest bar?"] == "blue"
    assert "Which colour is the shortest bar?" not in found  # a tie
    assert (
        found["Is the red bar taller than the blue bar?"] == "no"
        and found["Is the blue bar taller than the red bar?"] == "yes"
    )
    assert "Is the red bar taller than the green bar?" not in found
    assert found["What is the value of the blue bar?"] == "9"
    assert "trend" not in questions(chart)


def test_questions_about_known_lines_slices_and_points():
    lines = answers(Chart("line", ("red", "blue"), ((1, 2, 4, 5, 8), (9, 9, 6, 5, 5)), tuple("ABCDE")))
    assert lines["Does the red line rise or fall?"] == "rise" and lines["Does the blue line rise or fall?"] == "fall"
    assert lines["Which colour ends highest?"] == "red" and lines["What is the last value of the blue line?"] == "5"
    assert lines["Does the red line end above the blue line?"] == "yes"
    flat = questions(Chart("line", ("red",), ((4, 5, 4, 5, 6),), tuple("ABCDE")))
    assert "trend" not in flat and flat["colour"][0].answer == "red"
    pie = answers(Chart("pie", ("red", "blue"), (30, 70), ("A", "B")))
    assert (
        pie["Which colour is the largest slice?"] == "blue"
        and pie["Is the red slice larger than the blue slice?"] == "no"
    )
    near = questions(Chart("pie", ("red", "blue"), (49, 51), ("A", "B")))
    assert "extreme" not in near and "comparison" not in near
    points = Chart("scatter", ("pink", "green"), (((1, 1),) * 4, ((2, 2),) * 9))
    assert answers(points)["Which colour has the fewest points?"] == "pink"
    one = Chart("scatter", ("pink",), (tuple((x, 9 - x) for x in range(1, 9)),))
    assert (
        answers(one)["Do the points rise or fall?"] == "fall" and answers(one)["What colour are the points?"] == "pink"
    )


def test_captions_hold_what_the_questions_ask_for():
    bars = caption(Chart("bar", ("red", "blue"), (3, 9), ("A", "B")))
    assert bars == "bars: A red 3, B blue 9"
    pie = caption(Chart("pie", ("red", "blue"), (30, 70), ("A", "B")))
    assert pie == "slices: A red, B blue; from large to small: blue red"
    assert caption(Chart("line", ("red",), ((1, 2, 4),), tuple("ABC"))) == "lines: red 1 2 4"
    assert caption(Chart("scatter", ("pink", "green"), (((1, 1),) * 4, ((2, 2),) * 9))) == "points: pink 4, green 9"


def pixels_of(image: np.ndarray, colour: str) -> np.ndarray:
    wanted = np.array(ImageColor.getrgb(COLOURS[colour]))
    return np.abs(image.astype(int) - wanted).max(-1) <= 12


@pytest.mark.parametrize("size", [96, 112, 224])
def test_what_is_drawn_is_what_the_table_says(size):
    renderer = Renderer(size)
    bars = renderer.draw(Chart("bar", ("red", "blue", "green"), (3, 9, 6), ("A", "B", "C")))
    assert bars.shape == (size, size, 3) and bars.dtype == np.uint8
    heights = {c: pixels_of(bars, c).any(1).sum() for c in ("red", "blue", "green")}
    assert heights["blue"] / heights["red"] == pytest.approx(3, abs=0.25)
    assert heights["green"] / heights["red"] == pytest.approx(2, abs=0.2)
    columns = {c: np.flatnonzero(pixels_of(bars, c).any(0)).mean() for c in heights}
    assert columns["red"] < columns["blue"] < columns["green"]
    pie = renderer.draw(Chart("pie", ("red", "blue"), (1, 3), ("A", "B")))
    assert pixels_of(pie, "blue").sum() / pixels_of(pie, "red").sum() == pytest.approx(3, abs=0.4)
    line = pixels_of(renderer.draw(Chart("line", ("purple",), ((1, 3, 5, 7, 9),), tuple("ABCDE"))), "purple")
    rows, cols = np.nonzero(line)
    assert np.corrcoef(rows, cols)[0, 1] < -0.95
    dots = renderer.draw(Chart("scatter", ("pink", "orange"), (((2, 2),), ((5, 5), (8, 8)))))
    assert pixels_of(dots, "orange").sum() > 1.5 * pixels_of(dots, "pink").sum() > 0


def test_a_chart_leaves_nothing_behind_for_the_next():
    renderer = Renderer(96)
    chart = Chart("bar", ("red", "blue"), (3, 9), ("A", "B"))
    first = renderer.draw(chart)
    rng = random.Random(0)
    for _ in range(12):
        renderer.draw(draw_chart(rng, "train"))
    assert np.array_equal(renderer.draw(chart), first)
    assert np.array_equal(Renderer(96).draw(chart), first)


def test_rendering_is_fast_enough():
    rng = random.Random(1)
    charts = [draw_chart(rng, "train") for _ in range(60)]
    renderer = Renderer(112)
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        for chart in charts:
            renderer.draw(chart)
        best = max(best, len(charts) / (time.process_time() - start))
    assert best >= 60, f"{best:.0f} charts a second"


def test_real_charts_come_from_real_tables_and_other_columns_in_test():
    rng = random.Random(2)
    seen = {split: [draw_chart(rng, split, real=1.0) for _ in range(150)] for split in ("train", "test")}
    names = {split: {c.source.split(",")[0] for c in charts} for split, charts in seen.items()}
    tables = {table.name for table in real_tables()}
    assert {source.split(":")[0] for source in names["train"]} == tables
    assert not names["train"] & names["test"]
    assert {c.type for c in seen["test"]} == {"bar", "line", "pie", "scatter"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    return root, prepare_demo(root, num_charts=150, num_test_charts=120, size=96, processes=2)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_are_complete_and_clean(demo):
    root, data = demo
    assert data.counts == {
        "charts/captions.jsonl": 150,
        "charts/train.jsonl": 150,
        "charts/test.jsonl": 240,
        "digits/train.jsonl": 1438,
        "digits/test.jsonl": 359,
    }
    for path in (data.charts_train, data.charts_test, data.digits_test):
        report = check(DatasetSpec(name="demo", format="messages", path=str(path)), progress=False, write=False)
        assert report.num_bad == 0 and report.num_images == report.rows
    sample = open_source(DatasetSpec(name="c", format="messages", path=str(data.charts_train)))[0]
    assert Image.open(sample.images[0]).size == (96, 96) and sum(t.role == "assistant" for t in sample.turns) >= 2
    assert Image.open(
        root / "digits" / "train" / rows_of(data.digits_train)[0]["messages"][0]["content"][0]["image"].split("/")[1]
    ).size == (64, 64)


def test_held_out_rows_have_the_flat_form_and_share_no_picture(demo):
    root, data = demo
    for path in (data.charts_test, data.digits_test):
        for row in rows_of(path):
            assert set(row) >= {"id", "image", "question", "answer", "kind", "answer_type", "messages"}
            assert row["messages"][1]["content"] == row["answer"] and (path.parent / row["image"]).is_file()
    assert {row["answer_type"] for row in rows_of(data.charts_test)} == set(ANSWER_TYPES.values())
    for kind in ("charts", "digits"):
        hashes = {split: {p.read_bytes() for p in (root / kind / split).glob("*.png")} for split in ("train", "test")}
        assert len(hashes["train"] & hashes["test"]) <= (
            2 if kind == "charts" else 0
        )  # two bars can coincide by chance


def test_answers_are_balanced_so_that_blind_guessing_stays_low(demo):
    _, data = demo
    rows = rows_of(data.charts_test)
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 0.08 * len(rows)
    by_kind = defaultdict(Counter)
    for row in rows:
        by_kind[row["kind"]][row["answer"]] += 1
    share = {kind: max(counts.values()) / sum(counts.values()) for kind, counts in by_kind.items()}
    assert share["comparison"] <= 0.6 and share["trend"] <= 0.65
    assert share["colour"] <= 0.3 and share["extreme"] <= 0.3 and share["value"] <= 0.25 and share["count"] <= 0.35
    guess = {q: max(a, key=a.get) for q, a in answer_counts(rows_of(data.charts_train)).items()}
    assert sum(guess.get(row["question"]) == row["answer"] for row in rows) / len(rows) < 0.4
    known = defaultdict(Counter)
    for row in rows:
        known[row["question"]][row["answer"]] += 1
    assert 0.2 < sum(max(answers.values()) for answers in known.values()) / len(rows) < 0.6
    digits = Counter(row["answer"] for row in rows_of(data.digits_test))
    assert len(digits) == 10 and max(digits.values()) <= 40
    assert {row["question"] for row in rows_of(data.digits_test)} == set(DIGIT_QUESTIONS)


def answer_counts(rows: list[dict]) -> dict[str, Counter]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        for user, assistant in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            text = user["content"] if isinstance(user["content"], str) else user["content"][1]["text"].strip()
            counts[text][assistant["content"]] += 1
    return counts


def test_a_second_call_does_nothing_and_damage_is_repaired(demo):
    root, data = demo
    before = (root / "manifest.json").read_bytes()
    again = prepare_demo(root, num_charts=150, num_test_charts=120, size=96)
    assert not again.written and again.counts == data.counts
    (root / "charts/test/00003.png").unlink()
    repaired = prepare_demo(root, num_charts=150, num_test_charts=120, size=96, processes=1)
    assert repaired.written and (root / "manifest.json").read_bytes() == before  # one process draws what two drew


def test_the_seed_decides_the_data(demo, tmp_path):
    root, _ = demo
    other = prepare_demo(tmp_path, num_charts=20, num_test_charts=10, size=96, seed=1, processes=1)
    assert (
        other.charts_test.read_text() != (root / "charts/test.jsonl").read_text()[: len(other.charts_test.read_text())]
    )
    shutil.rmtree(tmp_path / "digits")


def test_the_tokenizer_covers_questions_in_few_tokens_and_is_kept(demo, tmp_path):
    from transformers import AutoTokenizer

    root, _ = demo
    folder = train_tokenizer(root, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Which colour is the tallest bar?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) <= 10 and len(tokenizer) <= 512
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert (
        chat.strip().endswith("ASSISTANT:") and text in chat and tokenizer.convert_tokens_to_ids("<image>") is not None
    )
    stamp = (folder / "tokenizer.json").stat().st_mtime_ns
    train_tokenizer(root, folder)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == stamp
