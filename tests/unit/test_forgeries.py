"""Do drawn forgeries differ from their originals where they say, and nowhere else?"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.demo.edits import INSTRUCTION, MARK, prepare_edits, read_edits, recoloured, small_scene
from mllm.demo.forgery import (
    FAINT,
    PHRASE,
    PLAIN,
    WORDS,
    paint_anew,
    photograph,
    prepare_forgeries,
    train_forgery_tokenizer,
)
from mllm.demo.scenes import COLOURS, confusing_looks, draw_scene
from mllm.heads.probability import class_tokens
from mllm.processing.mask_files import decode_rle


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_edit_changes_the_thing_alone_and_by_its_height() -> None:
    scene = draw_scene(random.Random(1))
    thing = scene.things[0]
    pixels = photograph(scene, np.random.default_rng(1))
    made = paint_anew(pixels, thing, 10.0)
    assert np.array_equal(made[~thing.mask], pixels[~thing.mask])
    inside = np.abs(made[thing.mask].astype(int) - pixels[thing.mask])
    assert inside.max() == 10 and (inside == 10).mean() > 0.8  # less where a value is at the end of its range
    other = np.asarray(recoloured(scene, thing, "blue"))
    assert (other[thing.mask] == COLOURS["blue"]).all()
    assert np.array_equal(other[~thing.mask], np.asarray(scene.picture)[~thing.mask])


def test_forgeries_come_in_pairs_of_other_scenes_in_every_split_and_again_by_seed(tmp_path: Path) -> None:
    root = prepare_forgeries(tmp_path / "a", train=6, validation=4, test=4)
    again = prepare_forgeries(tmp_path / "b", train=6, validation=4, test=4)
    seen = []
    for split, count in (("train", 6), ("validation", 4), ("test", 4)):
        found = rows(root / f"{split}.jsonl")
        assert found == rows(again / f"{split}.jsonl") and [row["answer"] for row in found] == [*WORDS] * (count // 2)
        for row in found:
            answer = row["messages"][-1]["content"]
            assert f"{PHRASE} {row['answer']}." in answer and answer.count(PHRASE) == 1
            assert row["height"] == 0 if row["answer"] == "real" else FAINT <= row["height"] <= PLAIN
            assert not any(word in answer.split("</REASONING>")[0] for word in WORDS), "the reasons tell the verdict"
        seen += [(root / row["image"]).read_bytes() for row in found]
        assert (root / found[0]["image"]).read_bytes() == (again / found[0]["image"]).read_bytes()
    assert len(set(seen)) == len(seen)


def test_both_words_begin_with_a_token_of_their_own(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(train_forgery_tokenizer(tmp_path))
    tokenize = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    phrase, words = class_tokens(tokenize, PHRASE, WORDS)
    assert len(set(words)) == 2 and len(phrase) > 2


def test_edits_are_asked_of_other_scenes_and_say_what_is_right(tmp_path: Path) -> None:
    root = prepare_edits(tmp_path, train=6, test=4)
    filled = prepare_edits(tmp_path / "filled", train=6, test=1, cell=4)
    trained, tests = rows(root / "train.jsonl"), read_edits(root)
    assert [len(row["masks"]) for row in trained] == [4] * 6 and len(tests) == len(read_edits(root, "valid")) == 4
    assert {row["image"].split("/")[-2] for row in (*tests, *read_edits(root, "valid"))} == {"test", "valid"}
    for number, row in enumerate(trained):
        source, target = (np.asarray(Image.open(root / name)) for name in row["images"])
        asked, answers = (row["messages"][k::2] for k in (0, 1))
        edit = 0 if number % 2 else 4  # the scene is edited first, or marked first
        assert [one["content"] == "<image>" for one in answers] == [k == edit for k in range(5)]
        assert [one["content"].startswith("<image>\n") for one in asked] == [True, False, False, False, False]
        words = [one["content"].removeprefix("<image>\n") for one in asked]
        marks = [text for k, text in enumerate(words) if k != edit]
        assert sum("Make" in text for text in marks) == 2, "half of the marks are asked for as an edit asks"
        whole = np.asarray(decode_rle(row["masks"][marks.index(MARK.format(phrase=words[edit]))])).astype(bool)
        changed = (source != target).any(-1)
        assert changed.any() and np.array_equal(changed, whole)
        cells = whole.reshape(8, 4, 8, 4).any((1, 3)).repeat(4, 0).repeat(4, 1)
        painted = np.asarray(Image.open(filled / row["images"][1]))
        assert np.array_equal((source != painted).any(-1), cells), "every cell that the thing touches, as a whole"
    for row in tests:
        assert row["instruction"] == INSTRUCTION.format(phrase=row["phrase"], colour=row["colour"])
        inside = np.asarray(Image.open(row["image"]))[row["mask"]].mean(0)
        wanted = np.array(COLOURS[row["colour"]])
        assert np.abs(inside - wanted).max() > 30, "there is nothing to change"


def test_an_unknown_colour_is_refused() -> None:
    scene = draw_scene(random.Random(2))
    with pytest.raises(KeyError):
        recoloured(scene, scene.things[0], "mauve")


def test_training_scenes_in_which_a_name_needs_both_words(tmp_path):
    root = prepare_edits(tmp_path, train=2, test=1, confusing=0.5)
    rng = random.Random("edits/train/0")
    plain = small_scene(rng)
    assert np.array_equal(np.asarray(Image.open(root / "pictures/00000.png")), np.asarray(plain.picture))
    pairs = [confusing_looks(random.Random(seed)) for seed in range(20)]
    assert all(max(Counter(colour for colour, _ in looks).values()) == 2 for looks in pairs)
    assert all(max(Counter(shape for _, shape in looks).values()) == 2 for looks in pairs)
    everywhere = prepare_edits(tmp_path / "all", train=1, test=1, confusing=1.0)
    rng = random.Random("edits/train/0")
    hard = small_scene(rng, confusing_looks(rng))
    assert np.array_equal(np.asarray(Image.open(everywhere / "pictures/00000.png")), np.asarray(hard.picture))
