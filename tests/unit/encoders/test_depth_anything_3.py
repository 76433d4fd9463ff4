"""Does the encoder compute what the backbone of Depth Anything 3 computes, and does it keep scenes apart?"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.depth_anything_3 import DepthAnything3Encoder, balanced
from mllm.errors import CheckpointError, ConfigError
from tests.golden.fill import check, fill_all, load
from tests.unit.encoders.views import build, check_gradients, stirred

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = {**DepthAnything3Encoder.tiny(), "keep_prefix": True}
SIZES = {"width": 32, "num_heads": 2, "depth": 6, "position_size": 56, "image_size": [42, 56], "keep_prefix": True}


def published(case, tmp_path, **changes):
    """Ours with the golden weights, read from a checkpoint as the published models are saved."""
    meta, inputs, outputs = load(GOLDEN / f"{case}.json")
    state = {f"model.backbone.pretrained.{k}": torch.from_numpy(v) for k, v in fill_all(meta).items()}
    state |= {"model.head.norm.weight": torch.zeros(2), "model.cam_dec.fc_t.bias": torch.zeros(3)}
    save_file(state, tmp_path / "model.safetensors")
    weights = {"source": str(tmp_path / "model.safetensors")}
    encoder = build_encoder(
        encoder_config({"type": "depth_anything_3", **SIZES, "weights": weights, **changes}, where="e")
    )
    encoder.load_pretrained()
    return encoder.eval(), meta, inputs, outputs


@torch.no_grad()
def test_the_backbones_output_with_a_chosen_reference_and_without(tmp_path):
    encoder, meta, inputs, outputs = published("depth_anything_3", tmp_path, across_from=2, layers=[2, 4, 6])
    pixels = {name: torch.from_numpy(inputs[f"input.{name}"])[0] for name in ("five", "two")}
    ids = torch.tensor([0] * 5 + [1] * 2)  # both scenes at once: nothing passes between them
    features = encoder(torch.cat([pixels["five"], pixels["two"]]), scene_ids=ids)
    have = {}
    for name, rows in (("five", slice(0, 5)), ("two", slice(5, 7))):
        for number, layer in enumerate((2, 4, 6)):
            span = slice(64 * number, 64 * (number + 1))
            have[f"output.{name}.{layer}"] = features.tokens[rows, :, span][None].numpy()
            have[f"output.{name}.{layer}.camera"] = features.prefix[rows, 0, span][None].numpy()
    check(meta, outputs, have)
    first, *_ = published("depth_anything_3", tmp_path, across_from=2, reference="first")
    gap = first(pixels["five"], scene_ids=torch.zeros(5)).tokens - features.tokens[:5, :, 128:]
    assert gap.abs().max() > 1e-3, "the golden scene's reference is not its first view"


@torch.no_grad()
def test_the_backbone_of_single_pictures(tmp_path):
    encoder, meta, inputs, outputs = published("depth_anything_3_alone", tmp_path, across_from=None, layers=[3, 6])
    features = encoder(torch.from_numpy(inputs["input.two"])[0], scene_ids=torch.tensor([0, 0]))
    have = {}
    for number, layer in enumerate((3, 6)):
        span = slice(32 * number, 32 * (number + 1))
        have[f"output.two.{layer}"] = features.tokens[None, ..., span].numpy()
        have[f"output.two.{layer}.camera"] = features.prefix[None, :, 0, span].numpy()
    check(meta, outputs, have)


@torch.no_grad()
def test_the_order_of_views_says_nothing_but_which_is_the_reference():
    encoder = stirred(TINY)
    pixels, order = torch.rand(5, 3, 16, 20), torch.tensor([3, 0, 4, 2, 1])
    ids = torch.zeros(5, dtype=torch.long)
    found, moved = encoder(pixels, scene_ids=ids), encoder(pixels[order], scene_ids=ids)
    torch.testing.assert_close(moved.tokens, found.tokens[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.prefix, found.prefix[order], atol=1e-4, rtol=1e-4)
    fixed = stirred(TINY, reference="first")
    one, other = fixed(pixels, scene_ids=ids), fixed(pixels[order], scene_ids=ids)
    assert (other.tokens - one.tokens[order]).abs().max() > 1e-2
    kept = torch.tensor([0, 3, 1, 4, 2])
    torch.testing.assert_close(fixed(pixels[kept], scene_ids=ids).tokens, one.tokens[kept], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scenes_may_be_mixed_up_and_of_different_length():
    encoder = stirred(TINY)
    pixels = torch.rand(6, 3, 16, 20)
    mixed = encoder(pixels, scene_ids=torch.tensor([7, 2, 7, 7, 2, 9]))
    for rows in ([0, 2, 3], [1, 4], [5]):
        alone = encoder(pixels[rows], scene_ids=torch.zeros(len(rows), dtype=torch.long))
        torch.testing.assert_close(mixed.tokens[rows], alone.tokens, atol=1e-5, rtol=1e-5)
    assert (encoder(pixels[[0]]).tokens[0] - mixed.tokens[0]).abs().max() > 1e-2


def test_the_reference_is_the_view_in_the_middle():
    torch.manual_seed(3)
    spread = torch.randn(5, 8) * torch.tensor([0.2, 1.0, 3.0, 1.5, 2.0])[:, None]
    place = int(balanced(spread))
    order = torch.tensor([2, 4, 0, 1, 3])
    assert order[int(balanced(spread[order]))] == place


@torch.no_grad()
def test_a_long_scene_is_read_in_parts_that_each_see_the_reference():
    whole = stirred(TINY, reference="first")
    parted = build(TINY, reference="first", chunk=3)
    parted.load_state_dict(whole.state_dict())
    pixels = torch.rand(6, 3, 16, 20)
    found = parted(pixels, scene_ids=torch.zeros(6, dtype=torch.long))
    for views, kept in (([0, 1, 2], slice(0, 3)), ([0, 3, 4], slice(1, 3)), ([0, 5], slice(1, 2))):
        alone = whole(pixels[views], scene_ids=torch.zeros(len(views), dtype=torch.long))
        torch.testing.assert_close(found.tokens[views[kept]], alone.tokens[kept], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="reference cannot be 'balanced'; add reference: first"):
        build(TINY, chunk=3)


def test_what_does_not_fit_is_told(tmp_path):
    save_file(
        {k: v.clone() for k, v in build(TINY, layers=[-1]).model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    weights = {"source": str(tmp_path / "model.safetensors")}
    with pytest.raises(CheckpointError, match="deeper than depth: 3"):
        build(TINY, depth=3, weights=weights).load_pretrained()
    with pytest.raises(CheckpointError, match=r"missing: blocks\.4\."):
        build(TINY, depth=5, weights=weights).load_pretrained()
    build(TINY, layers=[2], weights=weights).load_pretrained()
    with pytest.raises(ConfigError, match="no multiple of the patch size 4"):
        build(TINY, image_size=[15, 20])
    with pytest.raises(ConfigError, match="num_heads: 3 does not split width 32"):
        build(TINY, num_heads=3)


def test_gradients_reach_every_weight_and_recomputing_changes_none():
    check_gradients(stirred(TINY))
