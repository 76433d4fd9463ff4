"""Are the drawn rooms what their poses, depth and answers say?"""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.demo.rooms import COLOURS, FRAMES, KINDS, SIZE, VIEW, draw, make_room, prepare_rooms, question, seen
from mllm.processing.frames import VideoSpec
from mllm.processing.geometry import relative_poses
from mllm.processing.videos import frames_of
from mllm.types import Video


@pytest.fixture(scope="module")
def rooms():
    rng = random.Random(1)
    return [make_room(rng) for _ in range(6)]


def projected(room, frame, point):
    """(column, row, depth) of a point of the world in a frame, by its pose."""
    camera = room.cameras[frame]
    x, y, z = camera[:, :3].T @ (point - camera[:, 3])
    reach = np.tan(np.radians(VIEW / 2))
    return ((x / z / reach + 1) / 2 * SIZE, (y / z / reach + 1) / 2 * SIZE, z)


def test_balls_lie_where_the_cameras_say(rooms):
    found = 0
    for room in rooms:
        frames, depth, shown = draw(room)
        for number, ball in enumerate(room.balls):
            for frame in range(FRAMES):
                column, row, away = projected(room, frame, ball[:3])
                if away <= 0 or not (1 <= column < SIZE - 1 and 1 <= row < SIZE - 1):
                    continue
                place = (frame, int(row), int(column))
                if shown[place] != number:  # another one stands before it
                    assert shown[place] >= 0 and depth[place] < away
                    continue
                found += 1
                assert away - ball[3] - 0.15 < depth[place] < away
                colour = np.array(COLOURS[room.names[number]], float)
                assert np.allclose(frames[place] / frames[place].max(), colour / colour.max(), atol=0.1)
    assert found > 20


def test_the_floor_and_the_walls_are_as_far_as_they_are(rooms):
    _, depth, shown = draw(rooms[0])
    empty = shown < 0
    assert empty.any() and (depth[empty] > 0.5).all() and (depth[empty] < 8).all()
    low = np.tan(np.radians(VIEW / 2)) * (2 * (SIZE - 0.5) / SIZE - 1)
    assert np.allclose(depth[:, -1][empty[:, -1]], 1.2 / low), "the lowest row shows the floor under the same angle"


def measured(room, shown, kind, named) -> dict[str, float]:
    """The two balls' values by the room itself; the smaller one's is the answer."""
    numbers = {name: room.names.index(name) for name in named}
    if kind == "first":
        return {name: float(seen(shown, number) or 0) for name, number in numbers.items()}
    if kind == "larger":
        return {name: -room.balls[number, 3] for name, number in numbers.items()}
    other = room.balls[numbers.pop(named[0]), :3] if kind == "between" else room.cameras[0, :, 3]
    return {name: float(np.linalg.norm(room.balls[number, :3] - other)) for name, number in numbers.items()}


def test_answers_are_those_of_the_room(rooms):
    rng = random.Random(2)
    told = dict.fromkeys(KINDS, 0)
    for room in rooms:
        shown = draw(room)[2]
        turned = relative_poses(room.cameras)[-1, 3:7]  # world of the first camera → the last one's
        for kind in [*KINDS] * 3:
            asked = question(room, shown, kind, rng)
            if asked is None:
                continue
            told[kind] += 1
            named = re.findall(r"the (\w+)(?: or| ball)", asked[0])
            if kind == "turn":
                assert asked[1] == ("right" if turned[1] < 0 else "left")
            elif kind == "count":
                assert int(asked[1]) == len(room.names) == len(np.unique(shown[shown >= 0]))
            elif kind == "there":
                assert asked[1] == ("yes" if asked[0].split()[3] in room.names else "no")
            else:
                values = measured(room, shown, kind, named)
                assert values.pop(asked[1]) < min(values.values())
    assert min(told.values()) > 0


def test_rows_hold_what_heads_learn(tmp_path):
    root = prepare_rooms(tmp_path / "a", num_train=4, num_test=4)
    again = prepare_rooms(tmp_path / "b", num_train=4, num_test=4, processes=2)
    for name in ("train.jsonl", "test.jsonl", "seen.jsonl"):
        assert (root / name).read_text() == (again / name).read_text()
    tests = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in tests} == set(KINDS) and len({row["clip"] for row in tests}) == 4
    assert all(len(row["messages"]) == 2 for row in tests), "each is asked alone"
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["clip"] for row in rows}) == 4
    for row in rows:
        asked = [turn["content"][-1]["text"].strip() for turn in row["messages"][::2]]
        about = [(text.split(",")[0], frozenset(set(re.findall(r"\w+", text)) & set(COLOURS))) for text in asked]
        assert len(set(about)) == len(asked) >= 7, "no question tells another's answer by being the same"
        assert [len(turn["content"]) for turn in row["messages"][::2]] == [2] + [1] * (len(asked) - 1)
    silent = [json.loads(line) for line in (root / "seen.jsonl").read_text().splitlines()]
    assert [row["clip"] for row in silent] == sorted({row["clip"] for row in rows})
    assert all(len(row["messages"][0]["content"]) == 1 and row["answer"] == "yes" for row in silent)
    spec = DatasetSpec(name="rooms", path=str(root / "train.jsonl"), format="messages")
    for sample in open_source(spec):
        assert len(sample.images) == 1 and len(sample.poses[0]["matrices"]) == FRAMES
        assert np.load(sample.depths[0]).shape == (FRAMES, SIZE, SIZE)


def test_clips_show_what_an_encoded_video_would(tmp_path):
    rng = random.Random(5)
    room = make_room(rng)
    frames = draw(room)[0]
    np.save(tmp_path / "clip.npy", frames)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "clip.webp", save_all=True, append_images=others, duration=500, lossless=True)
    read = [
        np.stack(
            [
                np.asarray(picture)
                for _, picture in frames_of(Video(path), VideoSpec(frames=FRAMES), where="clip").pictures()
            ]
        )
        for path in (tmp_path / "clip.npy", tmp_path / "clip.webp")
    ]
    assert (read[0] == frames).all() and (read[1] == frames).all()
