"""What does a model learn from that edits pictures? Drawn scenes, marks in them, and the same scenes with one thing in another colour."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.demo.scenes import COLOURS, HERE, SHAPES, SIZE, Scene, Thing, draw_scene, looks_of, phrases
from mllm.processing.mask_files import decode_rle, encode_rle

INSTRUCTION = "Make {phrase} {colour}."
MARK = "Please segment {phrase}."
SIDE = 32
"""Of the pictures: a tokenizer and a decoder learn four times as many steps in the time that scenes of 64 pixels take."""


def recoloured(scene: Scene, thing: Thing, colour: str, cell: int = 1) -> Image.Image:
    """The scene with one thing in another colour; cell: with all of each square of so many pixels in which it has a part."""
    pixels = np.asarray(scene.picture).copy()
    rows, columns = (side // cell for side in thing.mask.shape)
    touched = thing.mask.reshape(rows, cell, columns, cell).any((1, 3))
    pixels[touched.repeat(cell, 0).repeat(cell, 1)] = COLOURS[colour]
    return Image.fromarray(pixels)


def small_scene(rng: random.Random, looks: Sequence[tuple[str, str]] | None = None) -> Scene:
    """A scene of `SIDE` pixels: every second one of `draw_scene`'s."""
    scene, step = draw_scene(rng, looks), SIZE // SIDE
    picture = Image.fromarray(np.asarray(scene.picture)[::step, ::step])
    return Scene(picture, tuple(replace(thing, mask=thing.mask[::step, ::step]) for thing in scene.things))


def prepare_edits(
    output_dir: Path | str = "runs/focus_demo/data",
    *,
    train: int = 4000,
    test: int = 200,
    seed: int = 0,
    confusing: float = 0.0,
    cell: int = 1,
) -> Path:
    """Write ``train.jsonl`` (every scene marked four times and recoloured, in either order), ``valid.jsonl`` and ``test.jsonl`` on other
    scenes, with PNG pictures; the folder ``pictures`` holds all training pictures, for a tokenizer.

    Args:
        output_dir: a folder, made where it is missing.
        train: training scenes.
        test: scenes that nothing was trained on, of either file.
        seed: of all that is drawn.
        confusing: share of training scenes in which neither colour nor shape alone names a thing (`confusing_looks`).
        cell: pixels of a side that a code stands for. A recoloured thing fills every cell that it touches: an edit paints inside a mask
            alone, so that what codes say beside it counts for nothing, and a code then need not tell the edge that the mask tells.

    Returns:
        The folder.
    """
    root = Path(output_dir)
    for name in ("pictures", "valid", "test"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(f"edits/train/{seed}"), []
    while len(rows) < train:
        number = len(rows)
        scene = small_scene(rng, looks_of(number, confusing, rng))
        named = [(phrase, thing) for phrase, thing in phrases(scene, unseen=False)]
        if named:
            rows.append(_row(root, scene, named, number, rng, cell))
    _write(root / "train.jsonl", rows)
    for name in ("valid", "test"):
        _write(root / f"{name}.jsonl", _asked(root, name, test, random.Random(f"edits/{name}/{seed}")))
    return root


def _asked(root: Path, folder: str, number: int, rng: random.Random) -> list[dict[str, Any]]:
    """Edits of so many scenes, whose pictures are put into a folder."""
    tests: list[dict[str, Any]] = []
    while len(tests) < number:
        scene = small_scene(rng)
        named = [(phrase, thing) for phrase, thing in phrases(scene, unseen=False)]
        if not named:
            continue
        (phrase, thing), name = rng.choice(named), f"{folder}/{len(tests):04d}.png"
        colour = rng.choice([one for one in COLOURS if one != thing.colour])
        scene.picture.save(root / name)
        source = base64.b64encode((root / name).read_bytes()).decode()
        edit = {"mask": encode_rle(thing.mask), "colour": colour, "colours": COLOURS, "source": source}
        instruction = INSTRUCTION.format(phrase=phrase, colour=colour)
        tests.append({"image": name, "phrase": phrase, "colour": colour, "instruction": instruction, "edit": edit})
    return tests


def _row(
    root: Path, scene: Scene, named: list[tuple[str, Thing]], number: int, rng: random.Random, cell: int
) -> dict[str, Any]:
    source, target = f"pictures/{number:05d}.png", f"pictures/{number:05d}-edited.png"
    scene.picture.save(root / source)
    chosen = [rng.choice(named) for _ in range(4)]
    edit, marks = [], []
    for place, (phrase, thing) in enumerate(chosen):  # half are asked for as an edit asks
        colour = rng.choice([one for one in COLOURS if one != thing.colour])
        instruction = INSTRUCTION.format(phrase=phrase, colour=colour)
        asked = MARK.format(phrase=phrase if place % 2 else instruction)
        marks.append((_turns(asked, HERE.format(phrase=phrase)), encode_rle(thing.mask)))
        if not place:
            recoloured(scene, thing, colour, cell).save(root / target)
            edit = _turns(instruction, "<image>")
    # Either kind of mark and the edit are asked for by themselves later, so each must come first in some scenes.
    rng.shuffle(marks)
    turns = [turn for turn, _ in marks]
    messages = [message for turn in ([edit, *turns] if number % 2 else [*turns, edit]) for message in turn]
    messages[0]["content"] = "<image>\n" + messages[0]["content"]
    masks = [mask for _, mask in marks]
    return {"id": f"edit-{number}", "images": [source, target], "messages": messages, "masks": masks}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_edits(root: Path, name: str = "test") -> list[dict[str, Any]]:
    """The rows of ``test.jsonl`` (or ``valid.jsonl``) with masks as arrays and pictures by their places."""
    found = []
    for line in (root / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append(
            {**row, "image": str(root / row["image"]), "mask": np.asarray(decode_rle(row["edit"]["mask"])).astype(bool)}
        )
    return found


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_edit_tokenizer(output_dir: Path | str) -> Path:
    """A byte-level BPE tokenizer of the demo's few words; returns ``output_dir``."""
    from mllm.demo.charts_and_digits import learn_bpe

    names = [f"the {colour} {shape}" for colour in COLOURS for shape in (*SHAPES, "thing")]
    names += [f"the {shape}" for shape in SHAPES] + ["the leftmost thing", "the rightmost thing"]
    lines = []
    for number, name in enumerate(names):
        instruction = INSTRUCTION.format(phrase=name, colour=list(COLOURS)[number % len(COLOURS)])
        lines += [f"USER: {MARK.format(phrase=name)} ", f"USER: {instruction} ASSISTANT: {HERE.format(phrase=name)} "]
    learn_bpe(lines * 4, 384).save_pretrained(str(output_dir))
    return Path(output_dir)
