"""Do heads of geometry learn the frames that the model sees, from rows, at no cost to a model that answers?"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.data.collate import collate, collate_packed
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.heads.geometry.depth_map import steps_off, without_a_factor
from mllm.heads.geometry.pose import mean_angle, pose_errors, standing_still, unit_translations
from mllm.models.build import build_model
from mllm.processing import chat
from mllm.processing.chat import encode_sample
from mllm.processing.depth_maps import lay_depth, read_poses
from mllm.processing.geometry import quaternions, relative_poses
from mllm.train.prepare import attention_inputs
from mllm.types import IMAGE_MARK, ImageSpec, Sample, Turn, Video
from tests.helpers import TINY_CLIP, picture, tiny_model, tiny_spec
from tests.unit.models.test_video import TINY_VGGT
from tests.videos import painted

HEADS = {"pose": {"type": "pose", "depth": 1, "num_heads": 2}, "far": {"type": "depth_map", "cells": 2}}
COUNT = 7
SEEN = (0, 3, 6)


def turn(degrees: float, axis: int = 1) -> np.ndarray:
    """A rotation about one axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.roll(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), (axis, axis), (0, 1))


def cameras(count: int = COUNT) -> np.ndarray:
    """Camera to world: each turned by 10° more and 0.5 m farther to the right."""
    return np.stack([np.c_[turn(10.0 * k), [0.5 * k + 3, 1, 2]] for k in range(count)])


def film(count: int = COUNT) -> Video:
    return Video([Image.fromarray(painted(number)) for number in range(count)], fps=2)


def depth_of(number: int) -> np.ndarray:
    """Metres ``(24, 64)``: 1 + number on the left, 10 on the right."""
    far = np.full((24, 64), 10.0, np.float32)
    far[:, :32] = 1 + number
    return far


def sample(*visuals: Any, poses: Any = (), depths: Any = ()) -> Sample:
    turns = [Turn("user", IMAGE_MARK * len(visuals) + "What?"), Turn("assistant", "seven")]
    return Sample("s", turns, list(visuals), "d", {}, [], list(poses), list(depths))


TAUGHT = {"poses": [{"matrices": cameras().tolist(), "fov": [60, 90]}], "depths": [[depth_of(k) for k in range(COUNT)]]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> tuple[Any, Any]:
    return tiny_model(tmp_path_factory.mktemp("model"), video={"frames": 3, "stamp": "{seconds:.1f}s "}, heads=HEADS)


def matrix(q: np.ndarray) -> np.ndarray:
    x, y, z, w = q
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def test_quaternions_are_those_of_the_rotations() -> None:
    turns = [turn(a, 0) @ turn(b, 1) @ turn(c, 2) for a, b, c in [(0, 0, 0), (180, 0, 0), (0, 180, 0), (20, -70, 130)]]
    found = quaternions(np.stack(turns))
    assert (found[:, 3] >= 0).all()
    for q, wanted in zip(found, turns, strict=True):
        np.testing.assert_allclose(matrix(q), wanted, atol=1e-9)


def test_poses_are_seen_from_the_first_known_camera() -> None:
    """A point of the world has the same place for camera k, reached directly or by way of the first camera."""
    some = cameras()
    some[0] = np.inf  # tracking was lost
    rows = relative_poses(some)
    assert np.isnan(rows[0]).all() and np.isnan(rows[:, 7:]).all()
    np.testing.assert_allclose(rows[1, :7], [0, 0, 0, 0, 0, 0, 1], atol=1e-12)
    point = np.array([0.3, -2.0, 5.0])
    first = some[1, :, :3].T @ (point - some[1, :, 3])
    for k in range(2, COUNT):
        there = some[k, :, :3].T @ (point - some[k, :, 3])
        np.testing.assert_allclose(matrix(rows[k, 3:7]) @ first + rows[k, :3], there, atol=1e-9)
    assert np.isnan(relative_poses(np.full((2, 3, 4), np.nan))).all()


def test_each_frame_that_is_seen_has_its_own_camera_and_depth(parts: tuple[Any, Any]) -> None:
    _, processor = parts
    found = encode_sample(processor, sample(picture(1), film(), poses=[None, *TAUGHT["poses"]])).geometry
    wanted = relative_poses(cameras()[list(SEEN)])
    assert torch.isnan(found["target_poses"][0]).all() and found["target_poses"].shape == (1 + 3, 9)
    np.testing.assert_allclose(found["target_poses"][1:, :7], wanted[:, :7], atol=1e-6)
    np.testing.assert_allclose(found["target_poses"][1:, 7:], np.radians([[60, 90]] * 3), atol=1e-6)
    assert torch.isnan(found["target_depths"]).all(), "this row tells no depth"
    back = Video(film().source, fps=2, play="reversed")
    maps = encode_sample(processor, sample(back, depths=TAUGHT["depths"])).geometry["target_depths"]
    assert maps.shape == (3, 8, 8), "a map of 4 x 4 tokens, 2 x 2 places each"
    assert maps[:, :, :4].flatten(1).unique(dim=1).flatten().tolist() == [1.0 + number for number in reversed(SEEN)]
    assert (maps[:, :, 4:] == 10).all()


def test_depth_lies_where_the_encoder_sees_the_picture() -> None:
    depth = np.arange(8, dtype=np.float32).reshape(2, 4) + 1
    wide = lay_depth(depth, ImageSpec(height=8, width=8, resize="letterbox"), (4, 4))
    assert wide[[0, 3]].isnan().all() and wide[1:3].tolist() == depth.tolist()
    crop = lay_depth(depth, ImageSpec(height=8, width=8, resize="crop"), (2, 2))
    assert crop.tolist() == depth[:, 1:3].tolist()
    squashed = lay_depth(depth, ImageSpec(height=8, width=8), (2, 4))
    assert squashed.tolist() == depth.tolist()


def test_rows_of_every_format_hold_poses_and_depth(tmp_path: Path, parts: tuple[Any, Any]) -> None:
    _, processor = parts
    for name in ("frames", "deep"):
        (tmp_path / name).mkdir()
    for k in range(COUNT):
        Image.fromarray(painted(k)).save(tmp_path / "frames" / f"{k}.png")
        Image.fromarray((depth_of(k) * 1000).astype(np.uint16)).save(tmp_path / "deep" / f"{k}.png")
    np.save(tmp_path / "cams.npy", cameras())
    np.savetxt(tmp_path / "cams.txt", cameras().reshape(COUNT, 12))
    np.save(tmp_path / "deep.npy", np.stack([depth_of(k) for k in range(COUNT)]))
    (tmp_path / "cams.json").write_text(json.dumps(cameras().tolist()))
    video = {"path": "frames", "fps": 2}
    files = [f"deep/{k}.png" for k in range(COUNT)]
    ways: list[tuple[Any, Any]] = [
        ("cams.npy", {"path": "deep", "unit": 0.001}),
        (["cams.txt"], [{"frames": files, "unit": 0.001}]),
        ([{"path": "cams.json"}], "deep.npy"),
    ]
    talk = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "a"}]
    messages = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "a"}]
    rows = [{"video": video, "poses": cams, "depths": deep} for cams, deep in ways]
    columns = {"question": "q", "answer": "a", "video": "video", "poses": "cams", "depths": "deep"}
    written: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "llava": ({}, [{**row, "conversations": talk} for row in rows]),
        "messages": ({}, [{**row, "messages": messages} for row in rows]),
        "columns": (
            {"columns": columns},
            [{"q": "?", "a": "a", "video": video, "cams": row["poses"], "deep": row["depths"]} for row in rows[1:2]],
        ),
    }
    found = []
    for format_, (more, lines) in written.items():
        path = tmp_path / f"{format_}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = open_source(DatasetSpec.model_validate({"name": "d", "path": str(path), "format": format_, **more}))
        found += [encode_sample(processor, one).geometry for one in source]
    assert len(found) == 7
    for one in found:
        np.testing.assert_allclose(one["target_poses"], found[0]["target_poses"], atol=1e-6, equal_nan=True)
        np.testing.assert_allclose(one["target_depths"], found[0]["target_depths"], atol=1e-6)
    assert found[0]["target_depths"][:, 0, 0].tolist() == pytest.approx([1, 4, 7])


@pytest.mark.parametrize(
    ("taught", "told"),
    [
        ({"poses": [cameras(5).tolist()]}, "poses 0: 5 poses for a video of 7 frames"),
        ({"poses": [cameras().tolist()] * 2}, "2 poses for 1 images and videos"),
        ({"poses": [(cameras() * [[[-1, 1, 1, 1]]]).tolist()]}, "the matrix of frame 0 turns by no rotation"),
        ({"poses": [(2 * cameras()).tolist()]}, "turns by no rotation"),
        ({"poses": [[[1, 2, 3]] * COUNT]}, r"poses of shape \(7, 3\)"),
        ({"poses": [[["a"] * 12] * COUNT]}, "matrices that are no numbers"),
        ({"poses": [{"matrix": 1}]}, "this one has matrix"),
        ({"poses": [{"matrices": cameras().tolist(), "fov": [60]}]}, r"fov is \[60\]"),
        ({"poses": ["nothing.npy"]}, "nothing.npy"),
        ({"poses": ["cams.bin"]}, "cams.bin"),
        ({"poses": [np.stack([np.vstack([c, [0, 0, 0, 1]]).T for c in cameras()]).tolist()]}, "written by columns"),
        ({"poses": [{"matrices": cameras().tolist(), "fov": [1.0, 1.5]}]}, "which is radians"),
        ({"depths": [[depth_of(k) * 1000 for k in range(COUNT)]]}, "write {path: …, unit: 0.001} for millimetres"),
        ({"depths": [[depth_of(0)] * 3]}, "depths 0: 3 depth maps for a video of 7 frames"),
        ({"depths": [[np.full((24, 64), np.nan, np.float32)] * COUNT]}, "no pixel of the depth is known"),
        ({"depths": [[-depth_of(1)] * COUNT]}, "frame 0: the depth -2 lies behind the camera"),
        ({"depths": [[depth_of(1).astype(np.uint16)] * COUNT]}, "nothing says what they stand for"),
        ({"depths": [[depth_of(1)[:, :20]] * COUNT]}, "a map of 20 × 24 for a picture of 128 × 48"),
        ({"depths": [{"path": "nothing.npy", "unit": 0.1}]}, "no such file of depth"),
        ({"depths": [{"frames": [None] * COUNT, "unit": 0}]}, "unit is 0"),
    ],
)
def test_what_does_not_fit_is_named(parts: tuple[Any, Any], taught: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=f"sample 's' of d.*{told}"):
        encode_sample(parts[1], sample(film(), **taught))


def test_depth_in_colours_is_no_depth(parts: tuple[Any, Any], tmp_path: Path) -> None:
    Image.fromarray(depth_of(1).astype(np.uint8)).convert("P").save(tmp_path / "p.png")
    maps = {"frames": [str(tmp_path / "p.png")] * COUNT, "unit": 1}
    with pytest.raises(DataError, match="a map with a palette"):
        encode_sample(parts[1], sample(film(), depths=[maps]))
    far = [{"frames": [depth_of(k) * 1000 for k in range(COUNT)], "unit": 1}]
    assert encode_sample(parts[1], sample(film(), depths=far)).geometry["target_depths"].max() == 10_000


def test_a_picture_has_no_poses_and_may_have_depth(parts: tuple[Any, Any]) -> None:
    _, processor = parts
    with pytest.raises(DataError, match="poses are of a video's frames, and this is a picture"):
        encode_sample(processor, sample(picture(1), poses=[cameras(1).tolist()]))
    still = encode_sample(processor, sample(picture(1), depths=[np.full((30, 40), 2.0, np.float32)]))
    assert (still.geometry["target_depths"] == 2).all()


def test_nan_is_left_out_of_the_loss_and_not_of_its_count() -> None:
    answers = torch.zeros(3, 9)
    targets = torch.full((3, 9), torch.nan)
    targets[1, :7] = torch.tensor([3.0, 0, 0, 0, 0, 0, 1])
    found = pose_errors(answers, targets)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"translation": 1.0, "rotation": 1 / 4}
    )
    squares = pose_errors(answers, targets, squared=True)
    assert {name: float(value) for name, value in squares.items()} == pytest.approx(
        {"translation": 3.0, "rotation": 1 / 4}
    )
    assert pose_errors(answers, torch.full((3, 9), torch.nan)) == {}
    half = torch.tensor([[0, 0, 0, 0, 0, 0.5**0.5, 0, 0.5**0.5, 0]])
    assert float(mean_angle(half.roll(-1, 1), torch.tensor([[0, 0, 0, 0, 0, 0, 1.0, 0, 0]]))) == pytest.approx(
        90, abs=0.01
    )
    far = torch.zeros(4, 9)
    far[1:, 0] = torch.tensor([2.0, 4.0, torch.nan])
    assert unit_translations(far)[:3, 0].tolist() == pytest.approx([0, 2 / 3, 4 / 3])
    off = torch.tensor([[[0.5, 0.5], [0.5, 0.0]], [[1.0, 1.0], [0.0, 2.0]]])
    known = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [0, 1]]]).bool()
    assert float(steps_off(off, known)) == pytest.approx((0 + 0 + 0 + 1) / 4)
    assert not without_a_factor(off[:1] * known[:1], known[:1], [0]).any(), "one factor mends it all"
    both = without_a_factor(off * known, known, [0, 1])
    assert both[1][known[1]].tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3])


def test_pixels_of_unknown_depth_are_left_out_of_the_loss_and_this_is_said_once(
    parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = parts
    monkeypatch.setattr("mllm.processing.geometry._TOLD", [])
    given: list[Any] = [np.full((48, 128), 3.0, np.float32)]

    def taught(value: float) -> tuple[torch.Tensor, dict[str, float]]:
        given[0][:, 64:] = value
        batch = collate(
            [encode_sample(processor, sample(picture(1, size=(128, 48)), depths=list(given)))], pad_token_id=0
        ).inputs
        output = model(**batch)
        return batch["target_depths"], {
            name: float(part) for name, part in output.losses.items() if name.startswith("far")
        }

    for unknown in (np.nan, np.inf, 0.0):
        maps, losses = taught(unknown)
        assert (maps[..., :4] == 3).all() and maps[..., 4:].isnan().all()
        whole, others = taught(3.0)
        assert (whole == 3).all() and all(map(np.isfinite, losses.values())) and losses != others
        _, more = taught(100.0)
        assert more["far/log"] > losses["far/log"] + 1, "had it been taken for a depth, it would weigh"
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the depth of 50 % of its pixels" in told and "left out of the loss" in told


def batches(processor: Any) -> list[dict[str, Any]]:
    samples = [
        encode_sample(processor, sample(film(), **TAUGHT)),
        encode_sample(processor, sample()),
        encode_sample(processor, sample(picture(2), film(5), depths=[np.full((30, 40), 3.0, np.float32), None])),
    ]
    room = sum(map(len, samples)) + 3
    both = collate(samples, pad_token_id=0), collate_packed([samples], max_length=room, pad_token_id=0)
    return [attention_inputs(batch, "sdpa") for batch in both]


def test_losses_are_reported_by_part_padded_and_packed_alike(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    padded, packed = (model(**batch) for batch in batches(processor))
    names = {f"pose/{part}" for part in ("translation", "rotation", "fov", "degrees", "turned")} | {
        "far/log",
        "far/gradient",
    }
    assert set(padded.losses) == names and all(torch.isfinite(value) for value in padded.losses.values())
    for name in names:
        torch.testing.assert_close(padded.losses[name], packed.losses[name], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        words = model(**{k: v for k, v in batches(processor)[0].items() if not k.startswith("target_")}).loss
    told = {name: float(value) for name, value in padded.losses.items()}
    assert float(padded.loss.detach()) > float(words) + told["far/log"] + told["far/gradient"]


def test_without_targets_nothing_is_reported_and_every_parameter_still_gets_a_gradient(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    batch = collate([encode_sample(processor, sample(film()))], pad_token_id=0).inputs
    assert torch.isnan(batch["target_poses"]).all()
    model.train().zero_grad()
    output = model(**batch)
    output.loss.backward()
    model.eval()
    assert not output.losses
    assert all(p.grad is not None and not p.grad.any() for p in model.heads.parameters())


def test_the_heads_learn_and_teach_the_model(tmp_path: Path) -> None:
    """A few steps on one clip: both losses fall, and the gradient reaches the encoder."""
    model, processor = tiny_model(tmp_path, video={"frames": 3}, heads=HEADS)
    colours = ["red", "red", "red", "lime", "lime", "blue", "blue"]
    clip = Video([Image.new("RGB", (128, 48), colour) for colour in colours], fps=2)
    batch = collate([encode_sample(processor, sample(clip, **TAUGHT))], pad_token_id=0).inputs
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(35):
        output = model.train()(**batch)
        found.append({name: float(value) for name, value in output.losses.items()})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    for name in ("pose/translation", "pose/rotation", "pose/fov", "pose/degrees", "far/log"):
        assert found[-1][name] < 0.6 * found[0][name], (name, found[0][name], found[-1][name])
    without = {key: value for key, value in batch.items() if not key.startswith("target_")}
    gradients = []
    for inputs in (batch, without):
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append(next(model.model.vision_tower.parameters()).grad.clone())
    assert not torch.allclose(*gradients)


def test_answers_never_run_them_and_are_those_of_a_model_without(
    parts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = parts
    plain, reader = tiny_model(tmp_path, video={"frames": 3, "stamp": "{seconds:.1f}s "})
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads.")}, strict=True)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a head ran")

    for head in model.heads.values():
        for part in head.modules():
            monkeypatch.setattr(part, "forward", never)
    inputs = processor(text="<video>\nWhat?", videos=film(), return_tensors="pt")
    assert not any(key.startswith("target_") for key in inputs)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))
    model.save_pretrained(tmp_path / "with")
    assert processor.geometry.poses and reader.geometry is None
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert set(config["heads"]) == set(HEADS)


def test_a_model_without_such_heads_reads_the_rows_and_says_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The control of an ablation is trained on the very same rows."""
    _, processor = tiny_model(tmp_path, video={"frames": 3})
    chat._tell_unread.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert encode_sample(processor, sample(film(), **TAUGHT)).geometry == {}
    assert caplog.text.count("d: its rows have poses, and no head of this model learns from them") == 1
    chat._tell_unread.cache_clear()
    caplog.clear()
    _, by_points = tiny_model(tmp_path, video={"which": "space_aware", "frames": 2, "candidates": 3})
    with caplog.at_level(logging.WARNING):
        scene = {name: told[0] for name, told in TAUGHT.items()}  # as reading a row lays them beside its video
        encode_sample(by_points, sample(replace(film(), points=scene), **TAUGHT))
    assert "learns from them" not in caplog.text, "frames are chosen by them"


def test_rows_without_what_a_head_learns_from_are_told_once(
    parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    chat._tell_missing.cache_clear()
    silent = sample(film(), depths=TAUGHT["depths"])
    silent.meta["pose"] = TAUGHT["poses"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            encode_sample(parts[1], silent)
    assert caplog.text.count("d: a head of this model learns from poses, and a row of it has none, is it 'pose'?") == 1
    assert "depths" not in caplog.text


def test_frames_taken_together_and_pictures_shown_twice_keep_their_targets(tmp_path: Path) -> None:
    encoders = {"semantic": dict(TINY_CLIP), "geometry": dict(TINY_VGGT)}
    model, processor = tiny_model(
        tmp_path, video={"frames": 3}, heads=HEADS, encoders=encoders, connector={"type": "spatial_mllm"}
    )
    still = sample(picture(1), film(), poses=[None, *TAUGHT["poses"]], depths=[np.ones((30, 40)), *TAUGHT["depths"]])
    batch = collate([encode_sample(processor, still)], pad_token_id=0).inputs
    assert batch["target_poses"].shape == (4, 9) and batch["target_depths"].shape == (4, 4, 4)
    head = model.heads["pose"]
    seen: dict[str, Any] = {}
    keep = type(head).answers

    def watch(states: Any, laid: Any) -> Any:
        seen["found"] = keep(head, states, laid)
        return seen["found"]

    head.answers = watch
    losses = model(**batch).losses
    answers, rows, counts = seen["found"]
    assert rows == [1, 2, 3] and counts == [3] and answers[0].shape == (3, 9)
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"video": None}, "heads: pose learns from a video's frames; add model.video"),
        ({"views": {"type": "tiles"}}, "heads: pose reads frames that are seen once and whole"),
        ({"heads": {"a": HEADS["pose"], "b": HEADS["pose"]}}, "a and b both learn of pose; keep one"),
        ({"heads": {"a": {**HEADS["pose"], "num_heads": 7}}}, "num_heads: 7 do not divide the width 64"),
        (
            {"heads": {"a": {"type": "probability", "phrase": "is", "words": ["yes", "no"]}}},
            "head 'a' takes no video yet",
        ),
        (
            {"encoders": {"semantic": dict(TINY_CLIP)}, "connector": {"type": "slow_fast"}},
            "this connector puts means of frames into the sequence",
        ),
        (
            {"heads": {"far": HEADS["far"]}, "connector": {"type": "resampler", "num_queries": 4}},
            "depth_map needs visual tokens that are a map",
        ),
    ],
)
def test_models_that_they_do_not_fit_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    from tests.helpers import tiny_tokenizer

    tiny_tokenizer().save_pretrained(str(tmp_path))
    spec = {"video": {"frames": 3}, "heads": {"pose": HEADS["pose"]}, **changes}
    with pytest.raises(ConfigError, match=told):
        build_model(tiny_spec(str(tmp_path), **spec))


def test_read_poses_takes_a_camera_that_is_not_known() -> None:
    some: list[Any] = cameras(3).tolist()
    some[1] = None
    found, view = read_poses(some, where="row")
    assert view is None and np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


def test_a_head_that_says_not_turned_is_as_far_off_as_the_cameras_turned() -> None:
    targets = torch.zeros(3, 9)
    targets[:, 3:7] = torch.from_numpy(quaternions(np.stack([turn(0), turn(60), turn(30, axis=0)]))).float()
    assert float(mean_angle(standing_still(targets), targets)) == pytest.approx(30.0, abs=0.1)
