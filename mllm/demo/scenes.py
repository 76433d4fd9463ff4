"""What does a model learn from that marks things? Drawn scenes of coloured shapes, with phrases, exact masks and questions."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.demo.unknown_words import Words, unknown_phrase
from mllm.processing.mask_files import encode_rle

SIZE = 64
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 214),
    "yellow": (241, 196, 15),
    "purple": (142, 68, 173),
}
SHAPES = ("circle", "square", "triangle", "cross")
UNSEEN = (("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"))
"""Colour and shape that no training phrase joins; tests ask for them."""
BLIND = "something"
"""What a phrase-blind model is asked for."""
PLACES = ("leftmost", "rightmost")
HERE, NOT_HERE, UNKNOWN = "It is {phrase} [SEG].", "It is {phrase} [SEG]: none.", "There is none."
"""Answers to a phrase. They say it before its mask, whose hidden state then holds it; what is not there has an empty mask. Words that name
nothing in any scene are not said again, and no mask stands for them."""
UNKNOWN_SHARE = 0.5
"""Of the rows of the second training stage: those that are also asked for what no scene can show."""
ASKED_FOR_NOTHING = ("the unicorn", "the cup", "the left car", "the purple dog")
"""Tests ask for them, and for more of the kind (`unknown`), of words that no training text has."""
Turned = tuple[str, str, list[Any]]
"""Request, answer, masks."""


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; mask ``(SIZE, SIZE)`` bool."""

    colour: str
    shape: str
    mask: np.ndarray
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """picture: RGB; things: none covers another."""

    picture: Image.Image
    things: tuple[Thing, ...]


def draw_scene(rng: random.Random, looks: Sequence[tuple[str, str]] | None = None) -> Scene:
    """Two to four shapes of different looks on a plain ground; looks: colour and shape of each, in place of those that are drawn. One
    that finds no room is left out."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    ground = np.array([rng.randint(200, 250)] * 3) + np.array([rng.randint(-8, 8) for _ in range(3)])
    pixels = np.tile(ground, (SIZE, SIZE, 1)).astype(np.uint8)
    if looks is None:
        every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        rng.shuffle(every)
        looks = every[: rng.randint(2, 4)]
    taken, things = np.zeros((SIZE, SIZE), bool), []
    for colour, shape in looks:
        for _ in range(40):
            radius = rng.uniform(7, 12)
            x, y = (rng.uniform(radius + 1, SIZE - radius - 1) for _ in range(2))
            mask = _shape(shape, columns - x, rows - y, radius)
            if not (mask & taken).any():
                break
        else:
            continue
        reach = (abs(columns - x) < radius + 2) & (abs(rows - y) < radius + 2)
        taken |= reach
        shade = np.array(COLOURS[colour]) + rng.randint(-12, 12)
        pixels[mask] = shade.clip(0, 255)
        things.append(Thing(colour, shape, mask, (x, y)))
    return Scene(Image.fromarray(pixels), tuple(things))


def confusing_looks(rng: random.Random) -> list[tuple[str, str]]:
    """Looks of a scene in which neither word names one of its things: another has its colour, another its shape. None is in ``UNSEEN``:
    what is always there to be left out would be learned as never meant."""
    while True:
        (colour, other_colour), (shape, other_shape) = rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)
        looks = [(colour, shape), (colour, other_shape), (other_colour, shape)]
        if not set(looks) & set(UNSEEN):
            return rng.sample(looks, len(looks))


def looks_of(number: int, confusing: float, rng: random.Random) -> list[tuple[str, str]] | None:
    """Looks for `draw_scene`: `confusing_looks` for this share of the scenes, evenly among their numbers; None for the others."""
    return confusing_looks(rng) if int((number + 1) * confusing) > int(number * confusing) else None


def _shape(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    if shape == "circle":
        return x**2 + y**2 < radius**2
    if shape == "square":
        return (abs(x) < 0.85 * radius) & (abs(y) < 0.85 * radius)
    if shape == "triangle":
        return (y < 0.8 * radius) & (abs(x) < 0.6 * (y + radius))
    return ((abs(x) < 0.35 * radius) | (abs(y) < 0.35 * radius)) & (abs(x) < radius) & (abs(y) < radius)


def phrases(scene: Scene, *, unseen: bool) -> list[tuple[str, Thing]]:
    """What names exactly one thing. unseen: only colour and shape of ``UNSEEN``, or none of these."""
    found = []
    for thing in scene.things:
        if ((thing.colour, thing.shape) in UNSEEN) == unseen:
            found.append((f"the {thing.colour} {thing.shape}", thing))
        if not unseen:
            alike = [other for other in scene.things if other.colour == thing.colour]
            found += [(f"the {thing.colour} thing", thing)] if len(alike) == 1 else []
            same = [other for other in scene.things if other.shape == thing.shape]
            found += [(f"the {thing.shape}", thing)] if len(same) == 1 else []
    if not unseen:
        ordered = sorted(scene.things, key=lambda thing: thing.centre[0])
        if len(ordered) > 1 and ordered[1].centre[0] - ordered[0].centre[0] > 6:
            found.append((f"the {PLACES[0]} thing", ordered[0]))
        if len(ordered) > 1 and ordered[-1].centre[0] - ordered[-2].centre[0] > 6:
            found.append((f"the {PLACES[1]} thing", ordered[-1]))
    return found


def absent(scene: Scene, rng: random.Random) -> str:
    """A phrase that names nothing in the scene."""
    there = {(thing.colour, thing.shape) for thing in scene.things}
    looks = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there and (c, s) not in UNSEEN]
    colour, shape = rng.choice(looks)
    return f"the {colour} {shape}"


def unknown(rng: random.Random, *, tested: bool) -> str:
    """A phrase with a word that no scene gives a meaning; tested: of words that training never has."""
    words = Words.split(tested=tested)
    return unknown_phrase(words, rng, colours=list(COLOURS), shapes=SHAPES, places=PLACES)


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about a scene that words answer, and the answer."""
    single = [t for t in scene.things if sum(o.shape == t.shape for o in scene.things) == 1]
    if single and rng.random() < 0.7:
        thing = rng.choice(single)
        return f"Which colour is the {thing.shape}?", thing.colour
    return "How many things are there?", str(len(scene.things))


def conversation(scene: Scene, rng: random.Random) -> list[Turned]:
    """What a training scene is asked for: two things, whose masks differ by the phrase alone, and perhaps what is not there and a question
    for words."""
    named, turns = phrases(scene, unseen=False), []
    for thing in rng.sample(scene.things, min(2, len(scene.things))):
        names = [phrase for phrase, other in named if other is thing]
        if names:
            turns.append(_marked(rng.choice(names), HERE, encode_rle(thing.mask)))
    if rng.random() < 0.25:
        turns.append(_marked(absent(scene, rng), NOT_HERE, None))
    if not turns or rng.random() < 0.5:
        turns.append((*question(scene, rng), []))
    rng.shuffle(turns)
    return turns


def _marked(phrase: str, answer: str, mask: Any) -> Turned:
    return f"Please segment {phrase}.", answer.format(phrase=phrase), [mask]


def prepare_scenes(
    output_dir: Path | str = "runs/segmentation_demo/data",
    *,
    train: int = 6000,
    test: int = 300,
    seed: int = 0,
    confusing: float = 0.0,
) -> Path:
    """Write ``train.jsonl`` (marking and questions), ``blind.jsonl`` (its phrases taken out), ``words.jsonl`` (without masks), the
    same rows as ``…_unknown.jsonl``, of which some are also asked for what no scene can show, and ``{marks,questions,unknown}_test.jsonl``
    on other scenes, with PNG pictures; returns the folder. Deterministic by seed. confusing: the share of training scenes in which a thing
    is named by colour and shape alone (`confusing_looks`)."""
    root = Path(output_dir)
    (root / "train").mkdir(parents=True, exist_ok=True)
    (root / "test").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"scenes/train/{seed}")
    strange = random.Random(f"scenes/train/unknown/{seed}")
    rows: dict[str, list[dict[str, Any]]] = {"": [], "_unknown": []}
    for number in range(train):
        scene, name = draw_scene(rng, looks_of(number, confusing, rng)), f"train/{number:05d}.png"
        scene.picture.save(root / name)
        turns = conversation(scene, rng)
        rows[""].append(_row(f"scene-{number}", name, turns))
        if strange.random() < UNKNOWN_SHARE:
            asked = f"Please segment {unknown(strange, tested=False)}."
            turns.insert(strange.randint(0, len(turns)), (asked, UNKNOWN, []))
        rows["_unknown"].append(_row(f"scene-{number}", name, turns))
    for kind, found in rows.items():
        _write(root / f"train{kind}.jsonl", found)
        _write(root / f"blind{kind}.jsonl", [_without_phrase(row) for row in found])
        _write(root / f"words{kind}.jsonl", [{**row, "masks": []} for row in found])
    rng = random.Random(f"scenes/test/{seed}")
    marks: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    number = 0
    while len(marks) < test:
        scene, name = draw_scene(rng), f"test/{number:05d}.png"
        named, number = phrases(scene, unseen=True), number + 1
        if named:
            scene.picture.save(root / name)
            phrase, thing = rng.choice(named)
            marks.append({"image": name, "phrase": phrase, "mask": encode_rle(thing.mask)})
            questions.append({"image": name, **dict(zip(("question", "answer"), question(scene, rng)))})
            marks.append({"image": name, "phrase": absent(scene, rng), "mask": None}) if len(
                questions
            ) % 5 == 0 else None
    rng, pictures = random.Random(f"scenes/unknown/{seed}"), [row["image"] for row in marks if row["mask"] is not None]
    strange = [*ASKED_FOR_NOTHING * (test // 20), *(unknown(rng, tested=True) for _ in range(test // 5))]
    _write(
        root / "unknown_test.jsonl",
        [{"image": pictures[n % len(pictures)], "phrase": p} for n, p in enumerate(strange)],
    )
    _write(root / "marks_test.jsonl", marks)
    _write(root / "questions_test.jsonl", questions)
    return root


def _row(identity: str, image: str, turns: list[Turned]) -> dict[str, Any]:
    messages, masks = [], []
    for number, (request, answer, marked) in enumerate(turns):
        messages.append({"role": "user", "content": request if number else f"<image>\n{request}"})
        messages.append({"role": "assistant", "content": answer})
        masks += marked
    return {"id": identity, "images": [image], "messages": messages, "masks": masks}


def _without_phrase(row: dict[str, Any]) -> dict[str, Any]:
    messages = []
    for message in row["messages"]:
        content = re.sub(r"Please segment .*", f"Please segment {BLIND}.", message["content"])
        messages.append({**message, "content": re.sub(r"It is .* \[SEG\]", f"It is {BLIND} [SEG]", content)})
    return {**row, "messages": messages}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_text_tokenizer(output_dir: Path | str, *, vocab_size: int = 384) -> Path:
    """A byte-level BPE tokenizer for these phrases, with the Vicuna template, saved for transformers; returns ``output_dir``."""
    from mllm.demo.charts_and_digits import learn_bpe

    names = [f"the {colour} {shape}" for colour in COLOURS for shape in (*SHAPES, "thing")]
    names += [f"the {shape}" for shape in SHAPES] + [*(f"the {place} thing" for place in PLACES), BLIND]
    requests = [f"Please segment {name}." for name in names] + [f"Which colour is the {shape}?" for shape in SHAPES]
    answers = [*COLOURS, "2", "3", "4", *(f"It is {name} {end}" for name in names for end in (".", ": none."))]
    lines = [f"USER: {text} " for text in (*requests, "How many things are there?")] + [
        f"ASSISTANT: {a} " for a in answers
    ]
    learn_bpe(lines, vocab_size).save_pretrained(str(output_dir))
    return Path(output_dir)
