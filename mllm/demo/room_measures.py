"""What does a model learn by reward? Drawn rooms asked as VSI-Bench asks: numbers, scored by how near they are, and choices of a letter.

The rooms are those of `mllm.demo.rooms`; every answer is exact. What may be learned by reward lies apart from what is learned by words,
and a copy of it has its answers handed out at random among questions of a kind: the control, whose reward teaches nothing of a room.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from mllm.demo.charts_and_digits import learn_bpe
from mllm.demo.clips import COLOURS
from mllm.demo.rooms import Room, draw, make_room, seen

KINDS = (
    "object_counting", "object_abs_distance", "object_size_estimation", "object_rel_distance", "object_rel_direction_easy",
    "obj_appearance_order",
)  # fmt: skip
"""VSI-Bench's names of what is asked; the first three are answered by a number."""
_TRIES = 8


def measure(room: Room, shown: np.ndarray, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of a kind (`KINDS`) and its answer; None where the room does not answer the one that was drawn clearly."""
    one, other, third = rng.sample(range(len(room.names)), 3)
    names, places = room.names, room.balls[:, :3]
    if kind == "object_counting":
        return "How many balls are in the room?", str(len(names))
    if kind == "object_abs_distance":
        apart = float(np.linalg.norm(places[one] - places[other]))
        return f"How many metres are between the {names[one]} and the {names[other]} ball?", f"{apart:.1f}"
    if kind == "object_size_estimation":
        return f"How many centimetres wide is the {names[one]} ball?", str(round(200 * float(room.balls[one, 3])))
    if kind == "object_rel_direction_easy":
        return _choice("Which way does the camera turn?", "right", "left", room.turns_right, rng)
    if kind == "object_rel_distance":
        asked, margin = f"Which ball is nearer to the {names[third]} one?", 0.8
        values = [float(np.linalg.norm(places[number] - places[third])) for number in (one, other)]
    else:
        asked, margin = "Which ball comes into view first?", 1.0
        values = [float(seen(shown, number) or 0) for number in (one, other)]
    if abs(values[0] - values[1]) < margin:
        return None
    return _choice(asked, names[one], names[other], values[0] < values[1], rng)


def _choice(asked: str, one: str, other: str, first: bool, rng: random.Random) -> tuple[str, str]:
    right, wrong = (one, other) if first else (other, one)
    letter = rng.choice("AB")
    options = (right, wrong) if letter == "A" else (wrong, right)
    return f"{asked} A. {options[0]} B. {options[1]}", letter


def prepare_measures(
    output_dir: Path | str, *, num_words: int = 1500, num_reward: int = 500, num_test: int = 150, seed: int = 0
) -> Path:
    """Write ``words.jsonl`` (a row for each room: a conversation of all kinds), ``reward.jsonl`` and ``test.jsonl`` (a row for each
    question, with ``question_type``), ``unrelated.jsonl`` (``reward.jsonl`` with answers of other rooms) and the clips as ``.npy``. No room
    is in two of the three. Deterministic by seed.

    Args:
        output_dir: the folder.
        num_words: rooms of the first stage.
        num_reward: rooms of the stage by reward.
        num_test: rooms of the test.
        seed: of all draws.

    Returns:
        The folder.
    """
    root = Path(output_dir)
    (root / "clips").mkdir(parents=True, exist_ok=True)
    for split, count in (("words", num_words), ("reward", num_reward), ("test", num_test)):
        rows = [row for number in range(count) for row in _rows(root, split, seed, number)]
        _write(root / f"{split}.jsonl", rows)
        if split == "reward":
            _write(root / "unrelated.jsonl", _handed_out(rows, random.Random(f"unrelated {seed}")))
    return root


def _rows(root: Path, split: str, seed: int, number: int) -> list[dict[str, Any]]:
    rng, clip = random.Random(f"measures {split} {seed} {number}"), f"clips/{split}-{number:05d}.npy"
    room = make_room(rng)
    frames, _, shown = draw(room)
    np.save(root / clip, frames)
    found: list[tuple[str, str, str]] = []
    for kind in KINDS:
        asked = next((pair for _ in range(_TRIES) if (pair := measure(room, shown, kind, rng))), None)
        if asked is not None:
            found.append((kind, *asked))
    rng.shuffle(found)
    groups = [found] if split == "words" else [[one] for one in found]
    return [_row(clip, group) for group in groups]


def _row(clip: str, asked: list[tuple[str, str, str]]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number, (_, words, answer) in enumerate(asked):
        text = {"type": "text", "text": words if number else "\n" + words}
        content = [text] if number else [{"type": "video", "video": clip}, text]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    kind, question, answer = asked[0]
    name = Path(clip).stem + ("" if len(asked) > 1 else f"-{kind}")
    return {
        "id": name, "clip": clip, "question_type": kind, "question": question, "answer": answer, "messages": messages,
    }  # fmt: skip


def _handed_out(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The same questions, each with the answer to another of its kind."""
    found = [{**row, "messages": [row["messages"][0], dict(row["messages"][1])]} for row in rows]
    for kind in KINDS:
        places = [k for k, row in enumerate(rows) if row["question_type"] == kind]
        answers = [rows[k]["answer"] for k in places]
        rng.shuffle(answers)
        for k, answer in zip(places, answers, strict=True):
            found[k]["answer"] = found[k]["messages"][1]["content"] = answer
    return found


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_measures_tokenizer(output_dir: Path | str) -> Path:
    """A byte-level BPE tokenizer of the demo's few words; every digit is a token. Returns ``output_dir``."""
    asked = ["How many balls are in the room?", "Which way does the camera turn? A. left B. right"]
    for one in COLOURS:
        asked.append(f"How many centimetres wide is the {one} ball?")
        asked += [f"How many metres are between the {one} and the {other} ball?" for other in COLOURS]
        asked += [f"Which ball is nearer to the {one} one? A. {one} B. {other}" for other in COLOURS]
        asked += [f"Which ball comes into view first? A. {one} B. {other}" for other in COLOURS]
    lines = [f"user\n{one}\nassistant\n{'AB'[k % 2]}\n" for k, one in enumerate(asked)]
    learn_bpe(lines * 10, 340, template="chatml", max_length=512).save_pretrained(str(output_dir))
    return Path(output_dir)
