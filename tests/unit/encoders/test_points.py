"""Is an encoder of points given where things lie, frame by frame of what the model sees, and nothing where nothing is known?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.demo.rooms import VIEW, draw, make_room, prepare_rooms
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import CheckpointError, ConfigError, DataError, UnavailableError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.processing.images import to_pixels_multi
from mllm.processing.scene_points import frame_points
from mllm.testing.encoders import check_encoder
from mllm.train.features.cache import why_not
from mllm.types import ImageSpec, Video
from tests.helpers import TINY_CLIP, picture, tiny_model

POINTS: dict[str, Any] = {"type": "points", "image_size": 32, "patch_size": 8, "width": 16}
PARTS: dict[str, Any] = {
    "encoders": {"frames": dict(TINY_CLIP), "places": POINTS},
    "connector": {"type": "channel_concat", "grid": [4, 4]},
    "video": {"frames": 4},
}
IMAGE = ImageSpec(height=32, width=32, points="refuse")


@pytest.fixture(scope="module")
def room():
    room = make_room(random.Random(1))
    frames, depth, shown = draw(room)
    points = {"poses": {"matrices": room.cameras.tolist(), "fov": [VIEW, VIEW]}, "depths": depth.astype(np.float32)}
    return room, frames, shown, points


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("points"), **PARTS)


def test_the_encoder_keeps_the_contract():
    assert check_encoder("points") is not None


def test_a_ball_lies_at_one_place_in_every_frame(room):
    room, frames, shown, points = room
    found = frame_points(Video(frames, points=points), range(6), 6, IMAGE, where="clip").permute(0, 2, 3, 1).numpy()
    first, seen = room.cameras[0], 0
    for number, ball in enumerate(room.balls):
        centre = first[:, :3].T @ (ball[:3] - first[:, 3])  # as the first frame has it
        for frame in range(6):
            of_ball = found[frame][shown[frame] == number]
            if len(of_ball) >= 6:
                seen += 1
                assert np.allclose(np.linalg.norm(of_ball - centre, axis=1), ball[3], atol=1e-3), "on its surface"
    assert seen > 6
    later = frame_points(Video(frames, points=points), [3, 1], 6, IMAGE, where="clip").permute(0, 2, 3, 1).numpy()
    there = room.cameras[3]
    world = found[1] @ first[:, :3].T + first[:, 3]
    assert np.allclose(later[1], (world - there[:, 3]) @ there[:, :3], atol=1e-4), (
        "seen from the first one that is shown"
    )


def test_a_file_of_points_gives_those_of_the_frames(room, tmp_path):
    _, frames, _, _ = room
    stored = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.savez(tmp_path / "points.npz", points=stored, frames=np.array([5, 2]))
    video = Video(frames, points=tmp_path / "points.npz")
    found = frame_points(video, [2, 5, 5], 6, IMAGE, where="clip").permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found[0], stored[1].repeat(2, 0).repeat(2, 1)) and np.array_equal(found[1], found[2])
    with pytest.raises(DataError, match="not of frame 3, which is seen"):
        frame_points(video, [2, 3], 6, IMAGE, where="clip")


@torch.no_grad()
def test_the_model_sees_them_in_training_and_answering_alike(made, room, tmp_path):
    model, processor = made
    _, frames, _, points = room
    video = Video(frames, fps=2.0, points=points)
    batch = processor(text="<video>\nwhat", videos=video, return_tensors="pt")
    given = batch["pixel_values_places"]
    wanted = frame_points(video, [0, 1, 3, 5], 6, IMAGE, where="clip")
    assert torch.equal(given, wanted) and batch["pixel_values"].shape[0] == 4
    logits = model(**batch).logits
    assert logits.isfinite().all()
    moved = model(**{**batch, "pixel_values_places": given + 1.0}).logits
    assert not torch.allclose(moved, logits)
    grey = processor(
        text="<video>\nwhat", videos=Video(frames, fps=2.0, points=points, play="gray"), return_tensors="pt"
    )
    assert grey["pixel_values_places"].isnan().all() and model(**grey).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(MllmForConditionalGeneration.from_pretrained(tmp_path).eval()(**batch).logits, logits)

    root = prepare_rooms(tmp_path / "rooms", num_train=1, num_test=1)
    sample = next(iter(open_source(DatasetSpec(name="rooms", path=str(root / "test.jsonl"), format="messages"))))
    encoded = encode_sample(processor, sample)
    told = {"poses": sample.poses[0], "depths": sample.depths[0]}
    other = processor(text="<video>\nwhat", videos=Video(sample.images[0].source, points=told), return_tensors="pt")
    assert torch.equal(encoded.pixels["pixel_values_places"], other["pixel_values_places"])


@torch.no_grad()
def test_what_is_not_known_lies_nowhere():
    encoder = build_encoder(encoder_config(POINTS, where="e")).eval()
    torch.nn.init.normal_(encoder.nowhere)  # pyright: ignore[reportArgumentType]
    pixels = torch.rand(1, 3, 32, 32)
    pixels[0, 1, :8, :8] = torch.nan  # of a pixel without one coordinate nothing is known
    pixels[0, :, 8:12, 8:16] = torch.nan
    tokens = encoder(pixels).tokens[0]
    assert torch.equal(tokens[0], encoder.state_dict()["nowhere"]) and tokens.isfinite().all()
    half = pixels.clone()
    half[0, :, 8:12, 8:16] = 5.0
    assert not torch.allclose(encoder(half).tokens[0, 5], tokens[5]), "half a patch is told from its known half alone"
    assert torch.equal(encoder(half).tokens[0, 6:], tokens[6:])


def test_what_tells_no_place_is_refused_by_name_or_let_through(made, room, tmp_path):
    from mllm.serve.vllm.refusals import refuse_unserved

    model, processor = made
    _, frames, _, points = room
    with pytest.raises(
        DataError, match="encoder places reads where the scene lies, and nothing tells it of this video"
    ):
        processor(text="<video>\nwhat", videos=Video(frames), return_tensors="pt")
    with pytest.raises(DataError, match="is a picture, and encoder 'places' reads where a video's pixels lie"):
        processor(text="<image>\nwhat", images=picture(), return_tensors="pt")
    broken = {**points, "depths": points["depths"] * np.nan}
    with pytest.raises(DataError, match="no pixel of its frames has both a known depth and a known camera"):
        processor(text="<video>\nwhat", videos=Video(frames, points=broken), return_tensors="pt")
    with pytest.raises(UnavailableError, match="encoder places of this checkpoint reads depth and camera poses"):
        refuse_unserved(model.config)
    assert why_not(model, set()) is not None
    with pytest.raises(ConfigError, match="encoder 'places' is given where a video's pixels lie"):
        to_pixels_multi(picture(), {"places": IMAGE})
    with pytest.raises(CheckpointError, match="no published weights"):
        model.model.vision_tower.encoders["places"].load_pretrained()
    for bad, told in (
        ({"patch_size": 5}, "does not divide"),
        ({"layers": [-2]}, "no blocks"),
        ({"keep_prefix": True}, "no class"),
    ):
        with pytest.raises(ConfigError, match=told):
            encoder_config({**POINTS, **bad}, where="e")
    parts = {**PARTS, "encoders": {"frames": dict(TINY_CLIP), "places": {**POINTS, "missing": "unknown"}}}
    lenient, reader = tiny_model(tmp_path, **parts)
    batch = reader(text="<video> <image>\nwhat", videos=Video(frames), images=picture(), return_tensors="pt")
    assert batch["pixel_values_places"].isnan().all() and lenient(**batch).logits.isfinite().all()
