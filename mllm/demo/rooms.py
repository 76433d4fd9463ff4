"""What does a model learn space from? Rooms with coloured balls, drawn from a camera that turns in them, with its poses and depth.

Each question has an exact answer by the room itself: whether a ball is there, which way the camera turns, which ball comes into view first,
which of two is nearer to where the camera started, larger, or nearer to a third, and how many there are. All but the first two need
frames that show different parts of the room.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm.demo.charts_and_digits import learn_bpe
from mllm.demo.clips import COLOURS

SIZE, FRAMES, MILLISECONDS, VIEW = 32, 6, 500, 70.0
"""Pixels of a frame's side, frames of a clip, how long each is shown, and the field of view in degrees."""
HEIGHT, HALF = 1.2, 3.5
"""Of the camera above the floor, and of the room's side, in metres."""
_WALLS = np.array([(150, 150, 165), (125, 140, 150), (165, 150, 140), (140, 125, 140)], np.float64)


@dataclass(frozen=True)
class Room:
    """names: the balls' colours; balls ``(N, 4)``: x, y, z and radius, in metres; cameras ``(F, 3, 4)``: camera → world (x right, y down,
    z forward; the floor is y = 0)."""

    names: tuple[str, ...]
    balls: np.ndarray
    cameras: np.ndarray

    @property
    def turns_right(self) -> bool:
        """Whether the camera turns to the right."""
        ahead = self.cameras[:, :, 2]
        return bool(np.cross(ahead[0], ahead[-1])[1] > 0)


def make_room(rng: random.Random) -> Room:
    """A room all of whose balls come into view."""
    while True:
        sweep = rng.choice((-1, 1)) * rng.uniform(70, 120)
        start, step = rng.uniform(0, 360), rng.uniform(-0.6, 0.6)
        cameras = [_camera(start + sweep * k / (FRAMES - 1), step * k / (FRAMES - 1)) for k in range(FRAMES)]
        names = tuple(rng.sample(sorted(COLOURS), rng.randint(3, 5)))
        balls: list[list[float]] = []
        for _ in range(60):
            angle = np.radians(start + rng.uniform(min(sweep, 0) - VIEW / 2, max(sweep, 0) + VIEW / 2))
            far, radius = rng.uniform(1.3, 3.0), rng.uniform(0.3, 0.5)
            ball = [far * np.sin(angle), -radius, far * np.cos(angle), radius]
            if len(balls) < len(names) and all(np.hypot(ball[0] - b[0], ball[2] - b[2]) > 1.1 for b in balls):
                balls.append(ball)
        room = Room(names, np.array(balls).reshape(-1, 4), np.stack(cameras))
        if len(balls) == len(names):
            shown = draw(room)[2]
            if all(seen(shown, number) is not None for number in range(len(names))):
                return room


def _camera(yaw: float, along: float) -> np.ndarray:
    c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.c_[turn, [along, -HEIGHT, 0.0]]


def draw(room: Room) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames uint8 ``(F, 32, 32, 3)``, their depth in metres ``(F, 32, 32)``, and which ball each pixel shows (-1: none)."""
    places = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    across, down = np.meshgrid(places, places)
    reach = np.tan(np.radians(VIEW / 2))
    rays = np.stack([across * reach, down * reach, np.ones_like(across)], -1)  # z = 1: lengths along them are depths
    ways = np.einsum("fij,rcj->frci", room.cameras[:, :, :3], rays)
    eyes = room.cameras[:, None, None, :, 3]
    depth, colour = _box(eyes, ways)
    shown = np.full(depth.shape, -1)
    for number, (name, ball) in enumerate(zip(room.names, room.balls, strict=True)):
        off = eyes - ball[:3]
        a, b, c = (ways**2).sum(-1), (ways * off).sum(-1), (off**2).sum(-1) - ball[3] ** 2
        inside = b**2 - a * c
        with np.errstate(invalid="ignore"):
            at = (-b - np.sqrt(inside)) / a
        front = (inside > 0) & (at > 0) & (at < depth)
        normal = (off + ways * np.where(front, at, 0.0)[..., None]) / ball[3]
        light = 0.65 + 0.35 * (normal * [0.4, -0.8, 0.45]).sum(-1)
        colour = np.where(front[..., None], np.array(COLOURS[name]) * light[..., None], colour)
        depth, shown = np.where(front, at, depth), np.where(front, number, shown)
    return colour.clip(0, 255).astype(np.uint8), depth, shown


def _box(eyes: np.ndarray, ways: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth and colour of the empty room: a chequered floor, four walls of unlike grey."""
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(ways[..., 1] > 0, -eyes[..., 1] / ways[..., 1], np.inf)
        sides = [(np.copysign(HALF, ways[..., axis]) - eyes[..., axis]) / ways[..., axis] for axis in (0, 2)]
    wall = np.minimum(*sides)
    depth = np.minimum(floor, wall)
    point = eyes + ways * depth[..., None]
    tiles = 70.0 + 40.0 * ((np.floor(point[..., 0]) + np.floor(point[..., 2])) % 2)
    which = np.where(sides[0] < sides[1], ways[..., 0] > 0, 2 + (ways[..., 2] > 0)).astype(int)
    return depth, np.where((floor < wall)[..., None], tiles[..., None], _WALLS[which])


def seen(shown: np.ndarray, number: int) -> int | None:
    """The first frame in which a ball has at least six pixels. shown: as `draw` gives it."""
    found = np.flatnonzero((shown == number).sum((1, 2)) >= 6)
    return int(found[0]) if len(found) else None


def question(room: Room, shown: np.ndarray, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of a kind (`KINDS`) and its answer; None where the room does not answer the one that was drawn clearly."""
    if kind == "there":
        absent = sorted(set(COLOURS) - set(room.names))
        name = rng.choice(absent if rng.random() < 0.5 else room.names)
        return f"Is there a {name} ball?", "yes" if name in room.names else "no"
    if kind == "turn":
        return "Does the camera turn left or right?", "right" if room.turns_right else "left"
    if kind == "count":
        return "How many balls are in the room?", str(len(room.names))
    one, other, third = rng.sample(range(len(room.names)), 3)
    pair = f"the {room.names[one]} or the {room.names[other]} ball"
    places = room.balls[:, :3]
    if kind == "first":
        asked, margin = f"Which comes into view first, {pair}?", 1.0
        values = [float(seen(shown, number) or 0) for number in (one, other)]
    elif kind == "nearer":
        asked, margin = f"Which is nearer to the start, {pair}?", 0.5
        values = [float(np.linalg.norm(places[number] - room.cameras[0, :, 3])) for number in (one, other)]
    elif kind == "larger":
        asked, margin = f"Which is larger, {pair}?", 0.08
        values = [-float(room.balls[number, 3]) for number in (one, other)]
    else:
        asked, margin = f"Which is nearer to the {room.names[third]} ball, {pair}?", 0.8
        values = [float(np.linalg.norm(places[number] - places[third])) for number in (one, other)]
    if abs(values[0] - values[1]) < margin:
        return None
    return asked, room.names[one if values[0] < values[1] else other]


KINDS = {"there": 2, "turn": 1, "count": 1, "first": 2, "nearer": 2, "larger": 2, "between": 2}
"""What is asked of each room of training, and how often with other balls; a room of the test is asked each once, alone."""
_TRIES = 8


def prepare_rooms(
    output_dir: Path | str, *, num_train: int = 1500, num_test: int = 300, seed: int = 0, processes: int = 1
) -> Path:
    """Write ``train.jsonl`` (a row for each room: a conversation about one clip, with ``poses`` and ``depths``; no two of its questions are
    of the same balls), ``test.jsonl`` (a row for each kind of question that a room answers), ``seen.jsonl`` (a row for each room of
    training in which nothing is asked, for an encoder that learns its poses and depth alone) and the clips as ``.npy``. Rooms of
    training and test are drawn apart. Deterministic by seed, whatever ``processes``.

    Args:
        output_dir: the folder.
        num_train: rooms of training.
        num_test: rooms of the test.
        seed: of all draws.
        processes: that draw side by side.

    Returns:
        The folder.
    """
    root = Path(output_dir)
    (root / "clips").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("test", num_test)):
        draw_one = partial(_rows, root, split, seed)
        if processes > 1:
            with ProcessPoolExecutor(processes) as pool:
                rooms = list(pool.map(draw_one, range(count), chunksize=32))
        else:
            rooms = [draw_one(number) for number in range(count)]
        _write(root / f"{split}.jsonl", [row for rows in rooms for row in rows])
        if split == "train":
            _write(root / "seen.jsonl", [_unasked(rows[0]) for rows in rooms])
    return root


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rows(root: Path, split: str, seed: int, number: int) -> list[dict[str, Any]]:
    """The clip and depth of a room, written, and its rows."""
    rng, name = random.Random(f"{split} {seed} {number}"), f"{split}-{number:05d}"
    room = make_room(rng)
    frames, depth, shown = draw(room)
    np.save(root / f"clips/{name}.npy", frames)
    np.save(root / f"clips/{name}-depth.npy", depth.astype(np.float16))
    found: dict[tuple[str, frozenset[str]], tuple[str, str]] = {}
    for kind, often in KINDS.items():
        for _ in range(_TRIES):
            asked = question(room, shown, kind, rng)
            about = (kind, frozenset(set(asked[0].replace("?", "").split()) & set(COLOURS))) if asked else None
            if asked and about and about not in found:  # the same balls again would only be copied
                found[about] = asked
            if sum(one == kind for one, _ in found) == (often if split == "train" else 1):
                break
    if split == "train":
        pairs = list(found.values())
        rng.shuffle(pairs)
        return [_row(name, f"clips/{name}", "all", room, pairs)]
    return [_row(f"{name}-{kind}", f"clips/{name}", kind, room, [pair]) for (kind, _), pair in found.items()]


def _row(name: str, clip: str, kind: str, room: Room, asked: list[tuple[str, str]]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for number, (words, answer) in enumerate(asked):
        text = {"type": "text", "text": words if number else "\n" + words}
        content = [text] if number else [{"type": "video", "video": f"{clip}.npy"}, text]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {
        "id": name, "clip": f"{clip}.npy", "kind": kind, "question": asked[0][0], "answer": asked[0][1], "messages": messages,
        "poses": [{"matrices": room.cameras.round(6).tolist(), "fov": [VIEW, VIEW]}],
        "depths": [f"{clip}-depth.npy"],
    }  # fmt: skip


def _unasked(row: dict[str, Any]) -> dict[str, Any]:
    """The same clip, its poses and depth, with a word to answer that says nothing."""
    user = {"role": "user", "content": row["messages"][0]["content"][:1]}
    told = {"role": "assistant", "content": "yes"}
    return {**row, "kind": "seen", "question": "", "answer": "yes", "messages": [user, told]}


def train_rooms_tokenizer(output_dir: Path | str) -> Path:
    """A byte-level BPE tokenizer of the demo's few words. Returns ``output_dir``."""
    pairs = [f"the {one} or the {other} ball?" for one in COLOURS for other in COLOURS]
    asked = ["Does the camera turn left or right?", "How many balls are in the room?"]
    asked += [f"Is there a {name} ball?" for name in COLOURS]
    whats = ["comes into view first", "is nearer to the start", "is larger", "is nearer to the red ball"]
    asked += [f"Which {what}, {pair}" for what in whats for pair in pairs]
    answers = [*COLOURS, "left", "right", "3", "4", "5", "yes", "no"]
    lines = [f"user\n{one}\nassistant\n{answers[k % len(answers)]}\n" for k, one in enumerate(asked)]
    learn_bpe(lines * 10, 340, template="chatml", max_length=512).save_pretrained(str(output_dir))
    return Path(output_dir)
