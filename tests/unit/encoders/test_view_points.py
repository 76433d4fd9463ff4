"""Do the heads say what VGGT's and Depth Anything 3's say, and are they read out of whole checkpoints?"""

# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders import multiview
from mllm.encoders.depth_anything_3 import DepthAnything3Encoder
from mllm.encoders.dpt import DptHead, place_waves
from mllm.encoders.vggt import VggtEncoder
from mllm.encoders.view_points import READERS, CameraDecoder, laid_by_cameras, rotations, vggt_points
from mllm.encoders.weights import read_weights
from mllm.errors import CheckpointError, ConfigError
from tests.golden.fill import check, fill, fill_all, load
from tests.unit.encoders.views import build, stirred

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = {
    "vggt": {**VggtEncoder.tiny(), "depth": 4, "layers": [1, 2, 3, 4], "patch_embed": "conv"},
    "depth_anything_3": {**DepthAnything3Encoder.tiny(), "layers": [1, 2, 3, 4]},
}
UPSTREAM = {
    "vggt": ("aggregator.", "point_head."),
    "depth_anything_3": ("model.backbone.pretrained.", "model."),
}
EXACT = {"tolerance": {"atol": 2e-6, "rtol": 1e-5}}


def head(**changes):
    return DptHead(64, patch_size=14, channels=(8, 12, 16, 16), fused=16, **changes)


def save_whole(kind, reader, folder):
    """As the published model is saved, another head beside."""
    encoder, own = UPSTREAM[kind]
    state = {f"{encoder}{k}": v for k, v in reader.encoder.model.state_dict().items()}
    state |= {f"{own}{k}": v for k, v in reader.head.state_dict().items()}
    state |= {"depth_head.norm.weight": torch.zeros(2)} if kind == "vggt" else {"model.cam_enc.x": torch.zeros(2)}
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return state


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
def test_depth_anything_3s_depth_and_cameras():
    meta, inputs, outputs = load(GOLDEN / "depth_anything_3_points.json")
    state = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}

    def below(prefix):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    sizes = {"width": 32, "num_heads": 2, "depth": 6, "position_size": 56, "image_size": [42, 56], "across_from": 2}
    config = {"type": "depth_anything_3", **sizes, "layers": [3, 4, 5, 6], "keep_prefix": True}
    encoder = build(config)
    encoder.model.load_state_dict(below("backbone."))
    own, cameras = head(outputs=2, clipped=False), CameraDecoder(64)
    own.load_state_dict({key: value for key, value in below("head.").items() if "aux" not in key})
    cameras.load_state_dict(below("cam_dec."))
    features = encoder(torch.from_numpy(inputs["input.four"])[0], scene_ids=torch.zeros(4))
    told = own(features.tokens.chunk(4, dim=-1), features.grid)
    have = {
        "output.four.depth": told[None, ..., 0].exp().numpy(),
        "output.four.confidence": 1 + told[None, ..., 1].exp().numpy(),
        "output.four.poses": cameras(features.prefix[:, 0].chunk(4, dim=-1)[-1])[None].numpy(),
    }
    check({"tolerance": {"atol": 2e-5, "rtol": 1e-5}}, outputs, have)


def test_depth_is_laid_where_known_cameras_see_it():
    """Two cameras, the second one metre to the right and turned by a quarter to the left, see a point of the room at known pixels."""
    quarter = [0.0, -np.sin(np.pi / 4), 0.0, np.cos(np.pi / 4)]
    poses = torch.tensor(
        [[0.5, 0, 0, 0, 0, 0, 2.0, np.pi / 2, np.pi / 2], [1.5, 0, 0, *quarter, np.pi / 2, np.pi / 2]],
        dtype=torch.float32,
    )
    points = laid_by_cameras(torch.full((2, 4, 4), 2.0), poses)
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
    state = save_whole(kind, donor, tmp_path)
    reader = READERS[kind](build(SMALL[kind], weights={"source": str(tmp_path)}))
    reader.load()
    assert len(opened) == 1 and reader.encoder._tensors is None, "once for encoder and head, and nothing of it kept"
    pixels = torch.rand(3, 3, 16, 20)
    points, confidence = reader.read(pixels, at_once=2)
    assert points.shape == (3, 16, 20, 3) and confidence.shape == (3, 16, 20) and confidence.min() >= 1
    torch.testing.assert_close((points, confidence), donor.read(pixels))
    lost = f"{UPSTREAM[kind][1]}{next(iter(donor.head.state_dict()))}"
    save_file({k: v.clone().contiguous() for k, v in state.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: "):
        reader.load()


def test_other_layers_and_models_without_cameras_are_refused():
    with pytest.raises(ConfigError, match=r"reads four layers; the encoder gives \[-1\]"):
        READERS["vggt"](build(VggtEncoder.tiny()))
    with pytest.raises(ConfigError, match="models of single pictures do not tell"):
        READERS["depth_anything_3"](build(SMALL["depth_anything_3"], across_from=None))
    for kind, depth, last in (("vggt", 24, 24), ("depth_anything_3", 12, 12), ("depth_anything_3", 24, 24)):
        assert READERS[kind].layers_read(depth)[-1] == last
