"""Do encoder and heads compute what MapAnything computes of pictures alone, in both of its releases?"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders import view_points
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.mapanything import MapAnythingEncoder
from mllm.encoders.view_points import READERS, rotations
from mllm.errors import CheckpointError
from tests.golden.fill import check, fill_all, load
from tests.unit.encoders.views import build, check_gradients, stirred

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = MapAnythingEncoder.tiny()
OLD = {**TINY, "release": 1, "width": 16}
KEYS = ("release", "width", "num_heads", "depth", "dinov2_width", "dinov2_depth", "dinov2_heads")


def published(release, folder, monkeypatch, **changes):
    """A reader from a checkpoint as published, and the vectors."""
    meta, inputs, outputs = load(GOLDEN / f"mapanything_{release}.json")
    state = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}
    state["info_sharing.view_pos_table"] = torch.from_numpy(outputs.pop(f"output.{NAMES[release]}.view_pos_table"))
    state |= {"depth_scale_encoder.norm_layer.weight": torch.zeros(3), "cam_trans_encoder.x": torch.zeros(2)}
    save_file(state, folder / "model.safetensors")
    sizes = {key: meta["ctor"][key] for key in KEYS}
    config = {"type": "mapanything", **sizes, "dinov2_image_size": 56, "image_size": [28, 42], "keep_prefix": True}
    config |= {"layers": [0, 2, 3, 4], "weights": {"source": str(folder)}}
    monkeypatch.setattr(view_points, "_MAPANYTHING", (16, (8, 12, 16, 16)))
    reader = READERS["mapanything"](build({**config, **changes}))
    return reader, inputs, outputs


NAMES = {1: "two", 2: "three"}


@torch.no_grad()
@pytest.mark.parametrize("release", NAMES)
def test_features_points_depth_and_cameras_from_a_whole_checkpoint(release, tmp_path, monkeypatch):
    reader, inputs, outputs = published(release, tmp_path, monkeypatch)
    own = reader.encoder.model.info_sharing.view_pos_table.clone()
    reader.load()
    assert torch.equal(reader.encoder.model.info_sharing.view_pos_table, own), "the table is known without a file"
    name = NAMES[release]
    pixels = torch.from_numpy(inputs[f"input.{name}"])[0]
    layers, prefix, _ = reader._layers(pixels)
    rays, depth, confidence, mask, places, quaternions, scale = reader.told(pixels, at_once=2)
    before = rays * depth[..., None]
    points = torch.einsum("sij,srcj->srci", rotations(quaternions), before) + places[:, None, None]
    have = {
        "points": points * scale[:, None, None, None],
        "depth": (depth * scale[:, None, None])[..., None],
        "confidence": confidence,
        "mask": mask,
        "places": places * scale[:, None],
        "quaternions": torch.nn.functional.normalize(quaternions, dim=-1),
        "scale": scale[:, None],
        "patches": layers[-1],
    }
    outputs[f"output.{name}.scale_token"] = outputs[f"output.{name}.scale_token"][0]
    have = {f"output.{name}.{key}": value[None].numpy() for key, value in have.items()}
    have[f"output.{name}.scale_token"] = prefix[0, :1].numpy()
    assert torch.equal(prefix[:, 0], prefix[:1, 0].expand(len(pixels), -1)), "one of the scene"
    if release == 2:
        have[f"output.{name}.class_tokens"] = prefix[None, :, 1:].numpy()
    assert have.keys() == outputs.keys()
    check({"tolerance": {"atol": 2e-6, "rtol": 1e-5}}, outputs, have)
    bias = reader.head.dense_head[1].conv2[2].bias
    bias[5] -= mask.median()  # half of the pixels now show no place
    laid, sure = reader.read(pixels)
    somewhere = ~laid.isnan().any(dim=-1)
    assert 0.4 < somewhere.float().mean() < 0.6 and mask[somewhere].min() >= mask[~somewhere].max()
    first = (points - places[0]) @ rotations(quaternions)[0] * scale[0]
    torch.testing.assert_close(laid[somewhere], first[somewhere], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sure, confidence)


def test_models_of_other_depths_and_releases_are_refused(tmp_path, monkeypatch):
    reader, *_ = published(2, tmp_path, monkeypatch)
    config = reader.encoder.config.model_dump(exclude={"info"}) | {"layers": [-1]}
    for changes, told in (
        ({"depth": 3}, r"deeper than depth: 3"),
        ({"depth": 5}, r"missing: info_sharing\.self_attention_blocks\.4\."),
        ({"dinov2_depth": 1}, r"deeper than dinov2_depth: 1"),
        ({"release": 1}, r"missing: encoder\.model\.blocks\.0\.mlp\.fc1"),
    ):
        with pytest.raises(CheckpointError, match=told):
            build_encoder(encoder_config({**config, **changes}, where="e")).load_pretrained()


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, OLD], ids=["release 2", "release 1"])
def test_a_scene_is_seen_together_and_refers_to_its_first_view(config):
    encoder = stirred(config, layers=[0, 2, -1])
    assert encoder.config.resolved_info.num_prefix_tokens == (2 if config is TINY else 1)
    pixels, ids = torch.rand(5, 3, 16, 20), torch.tensor([7, 1, 7, 7, 1])
    found = encoder(pixels, scene_ids=ids)
    for scene in (7, 1):
        alone = encoder(pixels[ids == scene], scene_ids=torch.zeros(int((ids == scene).sum())))
        torch.testing.assert_close(found.tokens[ids == scene], alone.tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.prefix[ids == scene], alone.prefix, atol=1e-5, rtol=1e-5)
    later = encoder(pixels[[0, 3, 2, 1, 4]], scene_ids=ids[[0, 3, 2, 1, 4]])
    torch.testing.assert_close(later.tokens[[0, 3, 2, 1, 4]], found.tokens, atol=1e-4, rtol=1e-4)
    turned = encoder(pixels[[2, 0, 3]], scene_ids=torch.zeros(3))
    assert (turned.tokens[1] - found.tokens[0]).abs().max() > 1e-2, "another first view"
    inner = config["dinov2_width"]
    assert torch.equal(encoder(pixels[:1]).tokens[..., :inner], found.tokens[:1, :, :inner]), "layer 0 is one view's"


@torch.no_grad()
def test_a_long_scene_is_read_in_parts_that_each_see_its_first_view():
    whole, parted = stirred(TINY), build(TINY, chunk=3)
    parted.load_state_dict(whole.state_dict())
    pixels = torch.rand(5, 3, 16, 20)
    found, own = parted(pixels, scene_ids=torch.zeros(5)), whole(pixels[[0, 3, 4]], scene_ids=torch.zeros(3))
    torch.testing.assert_close(found.tokens[3:], own.tokens[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.prefix[3:], own.prefix[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, OLD], ids=["release 2", "release 1"])
def test_gradients_reach_every_weight_and_recomputing_changes_none(config):
    check_gradients(stirred(config))
