"""Are the frames that show most of a scene chosen by its points, the same everywhere, once for each video?"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.demo.rooms import VIEW, draw, make_room, prepare_rooms
from mllm.errors import ConfigError, DataError
from mllm.processing import scene_points
from mllm.processing.frames import VideoSpec, video_spec
from mllm.processing.space_aware import greedy_cover, space_aware_frames, voxel_sets
from mllm.processing.videos import frames_of
from mllm.processing.visual_hash import visual_hash
from mllm.types import Video
from tests.videos import painted

SPEC = VideoSpec(which="space_aware", frames=3, candidates=6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scene_points, "_kept", {})


@pytest.fixture
def scene():
    room = make_room(random.Random(9))
    _, depth, _ = draw(room)
    frames = np.stack([painted(k) for k in range(len(depth))])
    return room, frames, depth.astype(np.float32)


def numbers(video, spec=SPEC):
    return list(frames_of(video, spec, where="clip").chosen.numbers)


def by_hand(room, depth):
    """The published choice on the frames' points, unprojected pixel by pixel."""
    reach, points = np.tan(np.radians(VIEW / 2)), []
    for camera, far in zip(room.cameras, depth, strict=True):
        side = len(far)
        found = np.zeros((side, side, 3), np.float32)
        for row in range(side):
            for column in range(side):
                ray = np.array([((column + 0.5) / side * 2 - 1) * reach, ((row + 0.5) / side * 2 - 1) * reach, 1.0])
                found[row, column] = camera[:, :3] @ (ray * far[row, column]) + camera[:, 3]
        points.append(found)
    found = torch.from_numpy(np.stack(points))
    return space_aware_frames(found, torch.ones(found.shape[:3]), 3), found


def test_poses_and_depths_choose_as_the_points_by_hand_do(scene, tmp_path):
    room, frames, depth = scene
    want, points = by_hand(room, depth)
    corner, far = points.flatten(0, 2).amin(0), points.flatten(0, 2).amax(0)
    edge = float((far - corner).min()) / 20
    sets = voxel_sets(points, torch.ones(points.shape[:3], dtype=torch.bool), corner, edge)
    assert sorted(greedy_cover(sets, 3)) == want and want != [0, 2, 5], "the choice is not that of uniform frames"
    np.save(tmp_path / "depth.npy", depth)
    poses = {"matrices": room.cameras.tolist(), "fov": [VIEW, VIEW]}
    assert numbers(Video(frames, points={"poses": poses, "depths": depth})) == want, "in memory"
    assert numbers(Video(frames, points={"poses": poses, "depths": str(tmp_path / "depth.npy")})) == want
    np.savez(tmp_path / "points.npz", points=points.numpy())
    assert numbers(Video(frames, points=tmp_path / "points.npz")) == want
    np.save(tmp_path / "clip.npy", frames)
    np.savez(tmp_path / "clip.npy.points.npz", points=points[[0, 2, 5]].numpy(), frames=np.array([0, 2, 5]))
    only = [[0, 2, 5][k] for k in space_aware_frames(points[[0, 2, 5]], torch.ones(3, *points.shape[1:3]), 3)]
    assert numbers(Video(tmp_path / "clip.npy")) == only, "the file beside the video is found"
    assert numbers(Video(frames, points=tmp_path / "points.npz", play="reversed")) == want[::-1]
    assert numbers(Video(frames[:3])) == [0, 1, 2], "a video that is seen whole needs no points"
    given = (None, "points.npz", {"poses": poses, "depths": depth}, {"poses": poses, "depths": depth + 1e-3})
    assert len({visual_hash(Video(frames, points=points)) for points in given}) == 4


def test_a_choice_is_made_once_for_each_video(scene, tmp_path, monkeypatch):
    room, frames, depth = scene
    np.save(tmp_path / "depth.npy", depth)
    points = {"poses": {"matrices": room.cameras.tolist(), "fov": [VIEW, VIEW]}, "depths": str(tmp_path / "depth.npy")}
    video, made = Video(frames, points=points), []
    real = scene_points._cover
    monkeypatch.setattr(scene_points, "_cover", lambda *given: made.append(1) or real(*given))
    first = numbers(video)
    assert numbers(video) == first and len(made) == 1
    monkeypatch.setattr(scene_points, "_kept", {})
    assert numbers(video) == first and len(made) == 1, "another process finds it on the disk"
    numbers(video, VideoSpec(which="space_aware", frames=2, candidates=6))
    assert len(made) == 2
    np.save(tmp_path / "depth.npy", depth * 2)
    numbers(video)
    assert len(made) == 3, "of other depths it is made anew"


def test_rows_of_data_choose_by_their_own_poses_and_depths(tmp_path):
    root = prepare_rooms(tmp_path, num_train=2, num_test=1)
    spec = DatasetSpec(name="rooms", path=str(root / "train.jsonl"), format="messages")
    sample = next(iter(open_source(spec)))
    chosen = numbers(sample.images[0])
    room_depth = np.load(sample.depths[0]).astype(np.float32)
    assert chosen == numbers(
        Video(np.load(sample.images[0].source), points={"poses": sample.poses[0], "depths": room_depth})
    )
    assert 1 <= len(chosen) <= 3 and chosen == sorted(set(chosen))


def test_what_does_not_tell_where_the_scene_lies_is_named(scene, tmp_path):
    room, frames, depth = scene
    matrices = room.cameras.tolist()
    np.savez(tmp_path / "flat.npz", points=np.zeros((6, 4, 4), np.float32))
    np.savez(tmp_path / "far.npz", points=np.zeros((2, 4, 4, 3), np.float32), frames=np.array([0, 9]))
    np.savez(tmp_path / "short.npz", points=np.zeros((2, 4, 4, 3), np.float32))
    np.savez(tmp_path / "nan.npz", points=np.full((6, 4, 4, 3), np.nan, np.float32))
    (tmp_path / "text.npz").write_text("no archive")
    some = np.random.default_rng(0).random((6, 4, 4, 3), np.float32)
    np.savez(tmp_path / "more.npz", points=some, conf=some[..., 0])
    np.savez(tmp_path / "twice.npz", points=some, frames=np.array([0, 0, 1, 2, 3, 4]))
    whole = {"matrices": matrices, "fov": [VIEW, VIEW]}
    wide = {"matrices": matrices, "fov": [100.0, 2 * np.degrees(np.arctan(np.tan(np.radians(50)) / 2))]}
    for points, told in (
        (None, "nothing tells this video's; a row gives poses and depths"),
        (str(tmp_path / "gone.npz"), "no such file of points"),
        (str(tmp_path / "flat.npz"), r"needs points \(F, H, W, 3\)"),
        (str(tmp_path / "far.npz"), "speaks of frame 9 of a video of 6"),
        (str(tmp_path / "short.npz"), "has points of 2 frames for a video of 6"),
        (str(tmp_path / "nan.npz"), "no point is a finite number"),
        (str(tmp_path / "text.npz"), "holds no points"),
        (str(tmp_path / "more.npz"), "has 'conf', which nothing reads"),
        (str(tmp_path / "twice.npz"), "expected whole numbers, each once"),
        ({"poses": whole}, "nothing tells this video's; a row gives poses and depths"),
        ({"poses": whole, "depths": depth, "fovs": 1}, "these have fovs besides"),
        ({"poses": {**whole, "matrices": (2 * room.cameras).tolist()}, "depths": depth}, "turns by no rotation"),
        ({"poses": wide, "depths": depth.repeat(2, axis=2)}, "so the other way round"),
        ({"poses": {"matrices": matrices}, "depths": depth}, "add fov"),
        ({"poses": {**whole, "matrices": matrices[:4]}, "depths": depth}, "4 poses for a video of 6 frames"),
        ({"poses": whole, "depths": depth[:4]}, "4 depth maps for a video of 6 frames"),
        ({"poses": whole, "depths": depth * np.nan}, "no point is a finite number"),
    ):
        with pytest.raises(DataError, match=f"clip: .*{told}"):
            numbers(Video(frames, points=points))
    for bad in ({"which": "space_aware", "fps": 1}, {"which": "space_aware", "frames": 9, "candidates": 8}):
        with pytest.raises(ConfigError, match="give frames, at most candidates"):
            video_spec(bad)
