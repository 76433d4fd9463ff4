"""Does Depth Anything 3 read known cameras as its authors' code does, from a row's poses to an answer, and no others?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.depth_anything_3 import DepthAnything3Encoder
from mllm.errors import CheckpointError, ConfigError, DataError, UnavailableError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.processing.known_cameras import frame_cameras, with_cameras
from mllm.serve.vllm.refusals import refuse_unserved
from mllm.testing.encoders import check_encoder
from mllm.train.features.cache import why_not
from mllm.types import ImageSpec, Video
from tests.golden.fill import check, fill_all, load
from tests.helpers import picture, tiny_model
from tests.unit.encoders.views import build, check_gradients, stirred

GOLDEN = Path(__file__).parents[2] / "golden" / "depth_anything_3_cameras.json"
SIZES: dict[str, Any] = {"width": 32, "num_heads": 2, "depth": 6, "position_size": 56, "across_from": 2}
TINY = {**DepthAnything3Encoder.tiny(), "known": ["cameras"]}
NOTHING = torch.full((1, 9), torch.nan)
IMAGE = ImageSpec(height=42, width=56, cameras="refuse")


def as_published(folder, **changes):
    """An encoder's config with the golden weights in a file, under the published names."""
    meta, inputs, outputs = load(GOLDEN)
    names = {"backbone.": "model.backbone.pretrained.", "cam_enc.": "model.cam_enc."}
    state = {"model.cam_dec.fc_t.bias": torch.zeros(3)}
    for key, value in fill_all(meta).items():
        start = next(own for own in names if key.startswith(own))
        state[names[start] + key.removeprefix(start)] = torch.from_numpy(value)
    save_file(state, folder / "model.safetensors")
    spec = {"type": "depth_anything_3", **SIZES, "image_size": [42, 56], "keep_prefix": True, "layers": [2, 4, 6]}
    weights = {"weights": {"source": str(folder / "model.safetensors")}}
    return {**spec, **weights, "known": ["cameras"], **changes}, meta, inputs, outputs


def cameras_of(count, seed=0):
    turns = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, 3, 3)))[0]
    turns *= np.linalg.det(turns)[:, None, None]
    return np.concatenate([turns, np.random.default_rng(seed + 1).normal(size=(count, 3, 1))], axis=2)


@torch.no_grad()
def test_scenes_with_and_without_cameras_are_the_authors(tmp_path):
    """From poses as a row has them; both scenes in one batch."""
    spec, meta, inputs, outputs = as_published(tmp_path)
    encoder = build_encoder(encoder_config(spec, where="e"))
    encoder.load_pretrained()
    told = {"poses": {"matrices": meta["cameras"], "fov": meta["fov"]}}
    video = Video(np.zeros((5, *meta["frame"], 3), np.uint8), points=told)
    cameras = frame_cameras(video, range(5), 5, IMAGE, size=tuple(meta["frame"]), where="clip")
    have = {"output.five.encoding": cameras[None].numpy()}
    token = encoder.model.cam_enc(cameras)
    have["output.five.token"] = token[None].numpy()
    pixels = {name: torch.from_numpy(inputs[f"input.{name}"])[0] for name in ("five", "two")}
    given = torch.cat([with_cameras(pixels["five"], cameras), with_cameras(pixels["two"], NOTHING)])
    features = encoder.eval()(given, scene_ids=torch.tensor([0] * 5 + [1] * 2))
    for name, rows in (("five", slice(0, 5)), ("two", slice(5, 7))):
        for number, layer in enumerate((2, 4, 6)):
            span = slice(64 * number, 64 * (number + 1))
            have[f"output.{name}.{layer}"] = features.tokens[rows, :, span][None].numpy()
            have[f"output.{name}.{layer}.camera"] = features.prefix[rows, 0, span][None].numpy()
    check(meta, outputs, have)
    plain = build_encoder(encoder_config({**spec, "known": []}, where="e"))
    plain.load_pretrained()
    assert not any("cam_enc" in name for name in plain.state_dict())
    without = encoder(with_cameras(pixels["five"], NOTHING), scene_ids=torch.zeros(5))
    assert torch.equal(without.tokens, plain.eval()(pixels["five"], scene_ids=torch.zeros(5)).tokens), (
        "a scene without cameras is seen as without the option"
    )
    assert (without.tokens - features.tokens[:5]).abs().max() > 1e-3


def test_weights_without_a_camera_encoder_are_refused(tmp_path):
    spec, *_ = as_published(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if ".cam_enc." not in key}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no camera encoder"):
        build_encoder(encoder_config(spec, where="e")).load_pretrained()
    build_encoder(encoder_config({**spec, "known": []}, where="e")).load_pretrained()
    kept |= {key: value for key, value in state.items() if "trunk.0" in key}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: cam_enc"):
        build_encoder(encoder_config(spec, where="e")).load_pretrained()


def test_the_encoder_keeps_the_contract_and_all_its_weights_learn():
    assert check_encoder(encoder_config(TINY, where="e")) is not None
    encoder = stirred(TINY, missing="unknown")
    view, still = torch.rand(4, 9), torch.rand(4, 3, 16, 20)
    view[3] = torch.nan  # the second scene's
    real = encoder.forward
    encoder.forward = lambda _, **options: real(with_cameras(still, view), **options)
    check_gradients(encoder)


@torch.no_grad()
def test_a_long_scene_in_parts_and_other_number_types():
    whole = stirred(TINY, reference="first")
    parted = build(TINY, reference="first", chunk=3)
    parted.load_state_dict(whole.state_dict())
    pixels, ids = with_cameras(torch.rand(5, 3, 16, 20), torch.rand(5, 9)), torch.zeros(5, dtype=torch.long)
    found = parted(pixels, scene_ids=ids)
    alone = whole(pixels[[0, 3, 4]], scene_ids=ids[:3])
    torch.testing.assert_close(found.tokens[3:], alone.tokens[1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="the last channel tells cameras"):
        whole(pixels[:, :3])
    exact = []
    hook = whole.model.cam_enc.register_forward_pre_hook(lambda _, given: exact.append(given[0]))
    whole.bfloat16()(pixels, scene_ids=ids)
    hook.remove()
    assert torch.equal(exact[0], pixels[:, 3].flatten(1)[:, :9]), "cameras are not rounded with the pixels"


@torch.no_grad()
def test_rows_chats_and_saved_models_see_the_same_cameras(tmp_path):
    parts = {
        "encoders": {"scene": {**TINY, "missing": "unknown"}},
        "connector": {"type": "average_pool", "grid": [2, 5]},
        "video": {"frames": 3},
    }
    model, processor = tiny_model(tmp_path / "start", **parts)
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 40, 3), dtype=np.uint8)
    poses = {"matrices": cameras_of(5).tolist(), "fov": [50.0, 60.0]}
    np.save(tmp_path / "clip.npy", frames)
    content = [{"type": "video", "video": "clip.npy"}, {"type": "text", "text": "what"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "this"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "poses": [poses]}) + "\n")
    sample = next(iter(open_source(DatasetSpec(name="r", path=str(tmp_path / "rows.jsonl"), format="messages"))))
    trained = encode_sample(processor, sample).pixels["pixel_values"]

    def ask(*visuals):
        text = " ".join("<video>" if isinstance(visual, Video) else "<image>" for visual in visuals)
        videos = [visual for visual in visuals if isinstance(visual, Video)]
        images = [visual for visual in visuals if not isinstance(visual, Video)]
        return processor(text=f"{text}\nwhat", videos=videos, images=images or None, return_tensors="pt")

    told = Video(frames, points={"poses": poses})
    batch = ask(told)
    assert torch.equal(batch["pixel_values"], trained) and trained.shape == (3, 4, 16, 20)
    image = processor.image_processor.specs["scene"]
    wanted = frame_cameras(told, [0, 2, 4], 5, image, size=(32, 40), where="clip")
    assert torch.equal(trained[:, 3].flatten(1)[:, :9], wanted) and wanted.isfinite().all()
    (tmp_path / "clip.npy.poses.json").write_text(json.dumps(poses))
    assert torch.equal(ask(Video(str(tmp_path / "clip.npy")))["pixel_values"], trained), "the file beside the video"
    bare = ask(Video(frames))
    assert bare["pixel_values"][:, 3].flatten(1)[:, :9].isnan().all()
    assert torch.equal(bare["pixel_values"][:, :3], trained[:, :3])
    grey = ask(Video(frames, points={"poses": poses}, play="gray"))
    assert grey["pixel_values"][:, 3].flatten(1)[:, :9].isnan().all(), "a control without sight has no cameras either"
    logits, without = model(**batch).logits, model(**bare).logits
    assert logits.isfinite().all() and without.isfinite().all() and not torch.allclose(logits, without)
    mixed = ask(told, Video(frames), picture())
    alone = [model.get_image_features(**{k: v for k, v in ask(one).items() if k in ("pixel_values", "video_times")})
             for one in (told, Video(frames), picture())]  # fmt: skip
    together = model.get_image_features(**{k: v for k, v in mixed.items() if k in ("pixel_values", "video_times")})
    for one, other in zip(together.pooler_output, alone, strict=True):
        torch.testing.assert_close(one, other.pooler_output[0], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = MllmForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(**batch).logits, logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**batch, **settings), model.generate(**batch, **settings))
    with pytest.raises(UnavailableError, match="encoder scene of this checkpoint reads known cameras"):
        refuse_unserved(model.config)
    assert "reads the cameras of frames" in (why_not(model, set()) or "")


def test_lens_follows_the_crop_and_what_is_lost_is_named(caplog):
    frames, matrices = np.zeros((3, 40, 80, 3), np.uint8), cameras_of(3)
    wide = {"matrices": matrices, "fov": [53.130102, 90.0]}
    crop = ImageSpec(height=20, width=20, resize="crop", cameras="refuse")

    def read(points, image=crop, **more):
        return frame_cameras(Video(frames, points=points, **more), [0, 1, 2], 3, image, size=(40, 80), where="clip")

    found = read({"poses": wide})
    assert np.allclose(np.degrees(found[:, 7:]), 53.130102, atol=1e-4), "a square in the middle of a picture 2 : 1"
    squashed = read({"poses": wide}, ImageSpec(height=20, width=20, cameras="refuse"))
    assert np.allclose(np.degrees(squashed[0, 7:]), [53.130102, 90], atol=1e-4)
    assert torch.equal(found[0, :7], torch.tensor([0.0, 0, 0, 0, 0, 0, 1])), "the first one sees the world from 0"
    lost = {"poses": {**wide, "matrices": [matrices[0].tolist(), None, matrices[2].tolist()]}}
    lenient = crop.model_copy(update={"cameras": "unknown"})
    assert read(lost, lenient).isnan().all() and read(None, lenient).isnan().all()
    assert "clip: the camera of frame 1 is not known (1 of 3 frames seen)" in caplog.text
    for points, told in (
        (None, "nothing tells this video's"),
        (lost, "that of frame 1 is not known"),
        ({"poses": {"matrices": matrices}}, "add fov"),
        ({"poses": {**wide, "matrices": matrices[:2]}}, "2 poses for a video of 3 frames"),
        ({"poses": {**wide, "fov": [90.0, 53.130102]}}, "the other way round"),
    ):
        with pytest.raises(DataError, match=f"clip.*{told}"):
            read(points)


def test_what_does_not_go_with_cameras_is_told(tmp_path):
    for bad, told in (
        ({"across_from": None}, "have no camera token"),
        ({"width": 24, "num_heads": 2}, "16 heads, which do not divide width 24"),
        ({"known": [], "missing": "unknown"}, "add known"),
        ({"known": ["depth"]}, "cameras"),
    ):
        with pytest.raises(ConfigError, match=told):
            build(TINY, **bad)
    parts = {
        "encoders": {"scene": TINY},
        "connector": {"type": "average_pool", "grid": [2, 5]},
        "video": {"frames": 3},
    }
    _, processor = tiny_model(tmp_path, **parts)
    with pytest.raises(DataError, match="encoder scene reads cameras"):
        processor(text="<video>\nwhat", videos=Video(np.zeros((3, 32, 40, 3), np.uint8)), return_tensors="pt")
    with pytest.raises(DataError, match="is a picture, and encoder 'scene' reads the cameras"):
        processor(text="<image>\nwhat", images=picture(), return_tensors="pt")
