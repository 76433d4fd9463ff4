"""Do the heads say what VGGT's, Depth Anything 3's and π³'s say, and are they and MapAnything's read out of whole checkpoints?"""

# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders import multiview, view_points
from mllm.encoders.camera_rays import cameras_of_rays, homography, pixel_places
from mllm.encoders.depth_anything_3 import DepthAnything3Encoder
from mllm.encoders.dpt import DptHead, place_waves
from mllm.encoders.mapanything import MapAnythingEncoder
from mllm.encoders.pi3 import Pi3Encoder
from mllm.encoders.vggt import VggtEncoder
from mllm.encoders.view_points import (
    READERS,
    SeenViews,
    before_cameras,
    cameras_of_poses,
    rotations,
    vggt_points,
)
from mllm.encoders.weights import read_weights
from mllm.errors import CheckpointError, ConfigError
from tests.golden.fill import check, fill, fill_all, load
from tests.unit.encoders.views import SMALL_PI3, build, stirred

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = {
    "vggt": {**VggtEncoder.tiny(), "depth": 4, "layers": [1, 2, 3, 4], "patch_embed": "conv"},
    "depth_anything_3": {**DepthAnything3Encoder.tiny(), "layers": [1, 2, 3, 4]},
    "pi3": {**Pi3Encoder.tiny(), "layers": [-1]},
    "mapanything": {**MapAnythingEncoder.tiny(), "layers": [0, 2, 3, 4]},
}
UPSTREAM = {
    "vggt": ("aggregator.", "point_head."),
    "depth_anything_3": ("model.backbone.pretrained.", "model."),
    "pi3": ("", ""),
    "mapanything": ("", ""),
}
BESIDE = {
    "vggt": "depth_head.norm.weight",
    "depth_anything_3": "model.cam_enc.x",
    "pi3": "image_mean",
    "mapanything": "dpt_regressor_head.conv1.bias",
}
"""A tensor of the published model that is read by nothing here."""
EXACT = {"tolerance": {"atol": 2e-6, "rtol": 1e-5}}


def head(**changes):
    return DptHead(64, patch_size=14, channels=(8, 12, 16, 16), fused=16, **changes)


def save_whole(kind, reader, folder):
    """As the published model is saved, another head beside."""
    encoder, own = UPSTREAM[kind]
    state = {f"{encoder}{k}": v for k, v in reader.encoder.model.state_dict().items()}
    state |= {f"{own}{k}": v for k, v in reader.head.state_dict().items()}
    if kind == "depth_anything_3":  # the rays' other outputs, with whose norm the last one shares its own
        finest = [k for k in state if "_aux.3." in k]
        state |= {k.replace("_aux.3.", "_aux.0."): state[k] for k in finest}
        state = {k: v for k, v in state.items() if "output_conv2_aux.3.2." not in k}
    if kind == "mapanything":  # of convolutions of one pixel
        linear = [k for k in state if k.startswith(("pose_head.proj.", "pose_head.res_conv.")) and state[k].ndim == 2]
        state |= {k: state[k][..., None, None] for k in linear}
    return save(state | {BESIDE[kind]: torch.zeros(2)}, folder)


def save(state, folder):
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return state


def golden_state(case, prefix=""):
    meta, inputs, outputs = load(GOLDEN / f"{case}.json")
    state = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}
    below = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return below, inputs, outputs


@torch.no_grad()
def test_vggts_points():
    meta, _, outputs = load(GOLDEN / "vggt_points.json")
    own = head(outputs=4, clipped=True)
    own.load_state_dict({name: torch.from_numpy(value) for name, value in fill_all(meta).items()})
    layers = [
        torch.from_numpy(fill(f"input.layer_{k}", (1, 2, 14, 64), meta["seed"], "normal"))[0, :, 2:] for k in range(4)
    ]
    points, confidence = vggt_points(own(layers, (3, 4)))
    assert points.std() > 1e-3
    have = {"output.two.points": points[None].numpy(), "output.two.confidence": confidence[None].numpy()}
    check(EXACT, outputs, have)
    other = head(outputs=4, clipped=False)
    other.load_state_dict(own.state_dict())
    assert (vggt_points(other(layers, (3, 4)))[0] - points).abs().max() > 1e-4, "what is clipped counts"


@torch.no_grad()
def test_depth_anything_3s_depth_rays_and_cameras(tmp_path, monkeypatch):
    """From a checkpoint as published, which is what loads it."""
    state, inputs, outputs = golden_state("depth_anything_3_points")
    names = {key: f"backbone.pretrained.{key[9:]}" if key.startswith("backbone.") else key for key in state}
    save({f"model.{names[key]}": value for key, value in state.items()}, tmp_path)
    monkeypatch.setitem(view_points._DA3_HEADS, 32, (16, (8, 12, 16, 16)))
    sizes = {"width": 32, "num_heads": 2, "depth": 6, "position_size": 56, "image_size": [42, 56], "across_from": 2}
    config = {"type": "depth_anything_3", **sizes, "layers": [3, 4, 5, 6], "keep_prefix": True}
    reader = READERS["depth_anything_3"](build(config, weights={"source": str(tmp_path)}))
    reader.load()
    features = reader.encoder(torch.from_numpy(inputs["input.four"])[0], scene_ids=torch.zeros(4))
    told, rays = reader.head["head"].both(features.tokens.chunk(4, dim=-1), features.grid)
    assert torch.equal(told, reader.head["head"](features.tokens.chunk(4, dim=-1), features.grid))
    have = {
        "output.four.depth": told[None, ..., 0].exp().numpy(),
        "output.four.confidence": 1 + told[None, ..., 1].exp().numpy(),
        "output.four.poses": reader.head["cam_dec"](features.prefix[:, 0].chunk(4, dim=-1)[-1])[None].numpy(),
        "output.four.rays": rays[None, ..., :6].numpy(),
        "output.four.rays_confidence": 1 + rays[None, ..., 6].exp().numpy(),
    }
    check({"tolerance": {"atol": 1e-5, "rtol": 1e-5}}, outputs, have)
    assert rays[..., :6].std() > 1e-3


def test_cameras_of_rays_with_noise_and_outliers():
    """As the authors' code has them where the axis goes through the middle; the homography of every view."""
    meta, inputs, outputs = load(GOLDEN / "depth_anything_3_rays.json")
    rays, confidence = (torch.from_numpy(inputs[f"input.{name}"]) for name in ("rays", "confidence"))
    found = cameras_of_rays(rays, confidence)
    product = found.turns @ found.lens
    fits = {"output.homographies": (product / product[:, 2:, 2:].abs()).float().numpy()}
    check(meta, {name: outputs[name] for name in fits}, fits)
    expected = torch.from_numpy(outputs["output.cameras"]).double()
    torch.testing.assert_close(found.places, expected[:, :3, 3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.turns[0], expected[0, :3, :3], atol=1e-5, rtol=0)
    cosines = ((found.turns.mT @ expected[:, :3, :3]).diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2
    assert (cosines > np.cos(np.radians(0.5))).all(), "another decomposition, of nearly the same"
    focal = torch.from_numpy(outputs["output.focal"]).double()
    torch.testing.assert_close(1 / found.lens.diagonal(dim1=1, dim2=2)[:, :2], focal, atol=0, rtol=1e-3)


def test_cameras_come_back_from_their_rays_whatever_their_lens():
    """Also where the axis goes beside the picture's middle, and of a camera that looks back. A ninth of the rays say anything."""
    quarter = torch.tensor([[0.0, 0, 0, 1], [0.1, 0.5, 0, 0.8], [0, 0.95, 0.05, 0.1]], dtype=torch.float64)
    lens = torch.tensor([[0.8, 0, 0.1], [0, 0.6, -0.05], [0, 0, 1]], dtype=torch.float64)
    turns, places = rotations(quarter), torch.tensor([[0.0, 0, 0], [1, 2, -1], [0, 0, 5]], dtype=torch.float64)
    seen = torch.einsum("rcj,kj,sik->srci", pixel_places(12, 16).double(), lens, turns)
    rays = torch.cat([3 * seen, places[:, None, None].expand(seen.shape)], dim=-1)
    rays[:, ::3, ::3, :3] += 2.0
    found = cameras_of_rays(rays, torch.ones(3, 12, 16))
    for have, expected in ((found.turns, turns), (found.places, places), (found.lens, lens.expand(3, 3, 3))):
        torch.testing.assert_close(have, expected, atol=1e-9, rtol=0)
    flat = torch.ones(16 * 12, dtype=torch.float64)
    plane = homography(pixel_places(12, 16).double().flatten(0, 1), seen[0].flatten(0, 1)[:, :2], flat)
    torch.testing.assert_close(plane / plane[2, 2], lens, atol=1e-9, rtol=0)


@torch.no_grad()
def test_pi3s_points_and_cameras(tmp_path):
    state, inputs, outputs = golden_state("pi3_heads")
    save(state | {"image_mean": torch.zeros(1, 3, 1, 1)}, tmp_path)
    config = {"type": "pi3", **SMALL_PI3, "keep_prefix": True, "weights": {"source": str(tmp_path)}}
    reader = READERS["pi3"](build(config))
    reader.load()
    pixels = torch.from_numpy(inputs["input.three"])[0]
    points, confidence, places, turns = reader.told(pixels)
    poses = torch.cat([torch.cat([turns, places[..., None]], dim=-1), torch.eye(4)[3:].expand(3, 1, 4)], dim=1)
    world = torch.einsum("sij,srcj->srci", turns, points) + places[:, None, None]
    have = {
        "output.three.local_points": points[None].numpy(),
        "output.three.points": world[None].numpy(),
        "output.three.conf": confidence[None, ..., None].numpy(),
        "output.three.camera_poses": poses[None].numpy(),
    }
    check({"tolerance": {"atol": 1e-5, "rtol": 1e-5}}, outputs, have)
    laid, sure = reader.read(pixels, at_once=2)
    torch.testing.assert_close(laid[0], points[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(laid, (world - places[0]) @ turns[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sure, confidence.sigmoid())


def test_depth_is_laid_where_known_cameras_see_it():
    """Two cameras, the second one metre to the right and turned by a quarter to the left, see a point of the room at known pixels."""
    quarter = [0.0, -np.sin(np.pi / 4), 0.0, np.cos(np.pi / 4)]
    poses = torch.tensor(
        [[0.5, 0, 0, 0, 0, 0, 2.0, np.pi / 2, np.pi / 2], [1.5, 0, 0, *quarter, np.pi / 2, np.pi / 2]],
        dtype=torch.float32,
    )
    cameras, depth = cameras_of_poses(poses), torch.full((2, 4, 4), 2.0)
    seen = SeenViews(before_cameras(depth, cameras), torch.ones(2, 4, 4), cameras.turns, cameras.places)
    points = seen.points
    torch.testing.assert_close(seen.depth, depth)
    assert seen.field_of_view == pytest.approx((90, 90), abs=1e-3)
    again = torch.einsum("sij,srcj->srci", seen.cameras[:, :, :3], seen.own) + seen.cameras[:, None, None, :, 3]
    torch.testing.assert_close(again, points)
    torch.testing.assert_close(points[0, 0, 3], torch.tensor([1.5, -1.5, 2.0]))  # up and to the right
    torch.testing.assert_close(points[1, 3, 3], torch.tensor([1.0 - 2.0, 1.5, 1.5]))  # ahead is now to the left
    turns = rotations(torch.randn(5, 4))
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5, rtol=0)


def test_waves_know_column_from_row():
    waves = place_waves(torch.zeros(1, 8, 3, 5), (42, 70))
    assert waves.shape == (1, 8, 3, 5)
    assert torch.equal(waves[:, :4], waves[:, :4, :1].expand(-1, -1, 3, -1)), "the first half tells the column"
    assert torch.equal(waves[:, 4:], waves[:, 4:, :, :1].expand(-1, -1, -1, 5)), "the second half the row"


@torch.no_grad()
@pytest.mark.parametrize("kind", SMALL)
def test_a_reader_is_read_out_of_a_whole_checkpoint_that_is_opened_once(kind, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(multiview, "read_weights", lambda path: opened.append(path) or read_weights(path))
    donor = READERS[kind](stirred(SMALL[kind]))
    save_whole(kind, donor, tmp_path)
    reader = READERS[kind](build(SMALL[kind], weights={"source": str(tmp_path)}))
    reader.load()
    assert len(opened) == 1 and reader.encoder._tensors is None, "once for encoder and head, and nothing of it kept"
    pixels = torch.rand(3, 3, 16, 20)
    points, confidence = reader.read(pixels, at_once=2)
    assert points.shape == (3, 16, 20, 3) and confidence.shape == (3, 16, 20)
    assert confidence.min() >= (0 if kind == "pi3" else 1)
    torch.testing.assert_close((points, confidence), donor.read(pixels), equal_nan=kind == "mapanything")


FAULTS = {
    "missing": (lambda state, key: {k: v for k, v in state.items() if k != key}, "1 missing: {key}"),
    "extra": (lambda state, key: state | {f"{key}_2": state[key]}, "1 not part of this architecture: {key}_2"),
    "shape": (lambda state, key: state | {key: torch.zeros(3, 5)}, "1 of another shape: {key} (3, 5) instead of"),
}


@pytest.mark.parametrize("kind", SMALL)
def test_each_weight_that_does_not_fit_is_one_error(kind, tmp_path):
    """Missing, left over, or of another shape: of the encoder and of each part of its head."""
    torch.manual_seed(0)
    reader = READERS[kind](build(SMALL[kind], weights={"source": str(tmp_path)}))
    state = save_whole(kind, reader, tmp_path)
    encoder, own = UPSTREAM[kind]
    places = [(encoder, list(reader.encoder.model.state_dict())[-1])]
    for part, at in reader.parts.items():
        places.append((f"{own}{part}." if at else own, next(iter(reader.head.get_submodule(at).state_dict()))))
    for prefix, name in places:
        for change, message in FAULTS.values():
            save(change(state, f"{prefix}{name}"), tmp_path)
            with pytest.raises(CheckpointError) as error:
                reader.load()
            assert message.format(key=name) in str(error.value) and str(error.value).count("instead of") <= 1


def test_other_layers_and_models_without_cameras_are_refused():
    with pytest.raises(ConfigError, match=r"reads four layers; the encoder gives \[-1\]"):
        READERS["vggt"](build(VggtEncoder.tiny()))
    with pytest.raises(ConfigError, match="models of single pictures do not tell"):
        READERS["depth_anything_3"](build(SMALL["depth_anything_3"], across_from=None))
    for kind, depth, last in (("vggt", 24, 24), ("depth_anything_3", 12, 12), ("depth_anything_3", 24, 24)):
        assert READERS[kind].layers_read(depth)[-1] == last
