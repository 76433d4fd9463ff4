"""Do the drawn scenes keep what is tested out of training, and the phrase out of its blind control?"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mllm.demo.scenes import (
    BLIND,
    COLOURS,
    PLACES,
    SHAPES,
    UNKNOWN,
    UNSEEN,
    confusing_looks,
    draw_scene,
    prepare_scenes,
)
from mllm.demo.unknown_words import LOOKS, LOOKS_OF_TESTS, NOUNS, NOUNS_OF_TESTS, is_tested


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_scenes(tmp_path_factory.mktemp("scenes"), train=60, test=20)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def test_every_mark_has_its_mask_and_no_tested_phrase_is_trained(data: Path) -> None:
    train = rows(data / "train.jsonl")
    unseen = [f"the {colour} {shape}" for colour, shape in UNSEEN]
    for row in train:
        assert text(row).count("[SEG]") == len(row["masks"])
        assert not any(phrase in text(row) for phrase in unseen)
    marks = [mask for row in train for mask in row["masks"]]
    assert len(marks) > 60 and None in marks  # more than a mask a picture, and some of what is not there
    tested = [row["phrase"] for row in rows(data / "marks_test.jsonl") if row["mask"] is not None]
    assert len(tested) >= 16 and set(tested) <= set(unseen)


def test_the_blind_control_is_told_no_phrase_and_sees_the_same_masks(data: Path) -> None:
    for whole, blind, words in zip(*(rows(data / f"{name}.jsonl") for name in ("train", "blind", "words"))):
        assert blind["masks"] == whole["masks"] and words["masks"] == [] and words["messages"] == whole["messages"]
        for message in blind["messages"]:
            marks = "[SEG]" in message["content"] or "segment" in message["content"]
            assert not marks or (BLIND in message["content"] and "the " not in message["content"])


def test_what_no_scene_can_show_is_asked_for_in_training_in_other_words_than_in_the_test(data: Path) -> None:
    known = {"the", "thing", *COLOURS, *SHAPES, *PLACES}
    asked: dict[bool, set[str]] = {False: set(), True: {row["phrase"] for row in rows(data / "unknown_test.jsonl")}}
    for plain, row in zip(rows(data / "train.jsonl"), rows(data / "train_unknown.jsonl"), strict=True):
        assert text(row).count("[SEG]") == len(row["masks"]) and row["masks"] == plain["masks"]
        pairs = list(zip(row["messages"][::2], row["messages"][1::2]))
        strange = [request["content"] for request, answer in pairs if answer["content"] == UNKNOWN]
        assert len(pairs) - len(strange) == len(plain["messages"]) // 2 and UNKNOWN not in text(plain)
        phrases = [one.removeprefix("<image>\n").removeprefix("Please segment ").removesuffix(".") for one in strange]
        assert all(not set(phrase.split()) <= known for phrase in phrases)
        asked[False] |= set(phrases)
    assert len(asked[False]) > 10 and len(asked[True]) > 2
    words = {
        tested: {word for phrase in phrases for word in phrase.split()} - known for tested, phrases in asked.items()
    }
    assert not words[False] & words[True]
    assert not {*NOUNS, *LOOKS} & {*NOUNS_OF_TESTS, *LOOKS_OF_TESTS} and not known & {
        *NOUNS,
        *LOOKS,
        *NOUNS_OF_TESTS,
        *LOOKS_OF_TESTS,
    }
    made_up = {tested: words[tested] - {*NOUNS, *LOOKS, *NOUNS_OF_TESTS, *LOOKS_OF_TESTS, "left"} for tested in words}
    assert made_up[False] and all(is_tested(word) == tested for tested in words for word in made_up[tested])


def test_confusing_scenes_need_both_words_and_hold_nothing_that_is_tested() -> None:
    rng = random.Random(0)
    for _ in range(20):
        looks = confusing_looks(rng)
        assert not set(looks) & set(UNSEEN)
        both = [
            look
            for look in looks
            if any(other[0] == look[0] for other in looks if other != look)
            and any(other[1] == look[1] for other in looks if other != look)
        ]
        assert len(both) == 1
        scene = draw_scene(rng, looks)
        assert {(thing.colour, thing.shape) for thing in scene.things} <= set(looks)
