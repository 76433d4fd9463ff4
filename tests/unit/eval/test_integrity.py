"""Do the stress test and the contamination check find what was put there, and nothing else?"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mllm.errors import DataError
from mllm.eval.data.loading import load_data
from mllm.eval.run import evaluate
from mllm.eval.studies.contamination import (
    find_overlaps,
    perceptual_hash,
    scores_without,
    text_ngrams,
    training_samples,
)
from mllm.eval.studies.stress import stress_test
from mllm.eval.task import load_task
from mllm.types import Sample, Turn
from tests.unit.eval.rules import RuleGenerator


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture of a few soft blobs."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def choice_data(folder: Path, count: int, biased: bool) -> Path:
    """Multiple choice in ScienceQA's format; biased: the longest option is right."""
    generator = np.random.default_rng(0)
    rows = {}
    for k in range(count):
        options = [" ".join(f"w{generator.integers(50)}" for _ in range(generator.integers(1, 4))) for _ in range(4)]
        gold = int(generator.integers(4))
        if biased:
            options[gold] += " and also this and that and more"
        question = f"Which of these is it, {generator.integers(50)}?"
        rows[str(k)] = {"question": question, "choices": options, "answer": gold, "hint": "", "image": None,
                        "grade": "1", "subject": "s", "topic": "t", "split": "test"}  # fmt: skip
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps(rows))
    return folder


def test_stress_test_finds_a_choice_benchmark_that_gives_itself_away(tmp_path):
    biased = load_data(load_task("scienceqa"), data={"scienceqa": choice_data(tmp_path / "b", 120, True)})
    result = stress_test(biased, trees=40)
    assert (
        result.kind == "choice" and result.accuracy.value > 0.9 and result.chance == 0.25 and result.num_samples == 120
    )
    assert len(result.bias) == 120 and min(result.bias.values()) >= 0 and np.mean(list(result.bias.values())) > 0.5
    assert stress_test(biased, trees=40).bias == result.bias, "seeded"
    fair = load_data(load_task("scienceqa"), data={"scienceqa": choice_data(tmp_path / "f", 120, False)})
    result = stress_test(fair, trees=40)
    assert result.accuracy.low < 0.3 and result.accuracy.value < 0.4


def open_data(folder: Path, answer) -> Path:
    folder.mkdir()
    rows = []
    for k in range(90):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k // 3}.png")
        question = f"What is the {['colour', 'shape', 'size'][k % 3]}?"
        rows.append({"id": k, "image": f"{k // 3}.png", "question": question, "answer": answer(k), "kind": "a"})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_stress_test_of_open_questions(tmp_path):
    told = open_data(tmp_path / "t", lambda k: ["red", "round", "big"][k % 3])
    result = stress_test(load_data(load_task("demo_charts"), data={"demo_charts": told}), trees=20)
    assert result.kind == "open" and result.accuracy.value == 1.0 and result.majority == pytest.approx(1 / 3)
    assert result.accuracy.num_clusters == 30
    generator = np.random.default_rng(1)
    answers = [str(x) for x in generator.integers(0, 10, 90)]
    hidden = open_data(tmp_path / "h", lambda k: answers[k])
    assert stress_test(load_data(load_task("demo_charts"), data={"demo_charts": hidden}), trees=20).accuracy.value < 0.3
    few = load_data(load_task("demo_charts"), data={"demo_charts": hidden}, limit=6)
    with pytest.raises(DataError, match="too few for 5 folds"):
        stress_test(few)


def test_perceptual_hash_survives_resizing_compression_and_brightness():
    image = scene(0)
    buffer = io.BytesIO()
    image.resize((90, 70)).save(buffer, "JPEG", quality=60)
    changed = [Image.open(buffer), ImageEnhance.Brightness(image).enhance(1.1), image.convert("L").convert("RGB")]
    assert all((perceptual_hash(image) ^ perceptual_hash(copy)).bit_count() <= 4 for copy in changed)
    others = [(perceptual_hash(image) ^ perceptual_hash(scene(k))).bit_count() for k in range(1, 40)]
    assert min(others) > 10


def test_text_ngrams():
    assert text_ngrams("What, is THIS?", 2) == {("what", "is"), ("is", "this")}
    assert text_ngrams("one two", 8) == {("one", "two")} and text_ngrams("", 3) == set()


def test_overlaps_in_pictures_and_words_and_the_score_without_them(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    rows = []
    for k in range(10):
        scene(k).save(folder / f"{k}.png")
        question = f"In chart number {k}, how large is the tallest of all bars?"
        rows.append({"id": f"b{k}", "image": f"{k}.png", "question": question, "answer": "5", "kind": "a"})
    rows.append({"id": "short", "image": "9.png", "question": "What?", "answer": "5", "kind": "a"})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_data(load_task("demo_charts"), data={"demo_charts": folder})
    training = [
        Sample("t1", [Turn("user", "Describe."), Turn("assistant", rows[5]["question"])], [scene(3).resize((80, 60))]),
        Sample("t2", [Turn("user", "Please: in chart number 7 how large is the tallest of all bars")], [scene(99)]),
        Sample("t3", [Turn("user", "What?")], []),
    ]
    overlaps = find_overlaps(data, training_samples(training), min_share=0.9)
    assert [(o.id, o.kind, o.training_id) for o in overlaps] == [("b3", "image", "t1"), ("b7", "text", "t2")]
    assert overlaps[0].measure <= 4 and overlaps[1].measure == 1.0
    # right on the two overlapping ones only
    rule = RuleGenerator(lambda request: "5" if request.id in ("b3", "b7") else "x")
    evaluate(rule, ["demo_charts"], tmp_path / "o", data={"demo_charts": folder}, progress=False)
    score = scores_without(tmp_path / "o/demo_charts.jsonl", overlaps, ["exact_match"])[0]
    assert score.all_samples == pytest.approx(200 / 11) and score.without == 0.0 and score.only == 100.0
    assert (score.num_samples, score.num_overlapping) == (11, 2)
    with pytest.raises(DataError, match="rescore it first"):
        scores_without(tmp_path / "o/demo_charts.jsonl", overlaps, ["mmmu"])
