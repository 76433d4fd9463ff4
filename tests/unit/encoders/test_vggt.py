"""Does the geometry encoder compute what VGGT computes, and does it keep scenes apart?"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders import vggt, view_blocks
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import CheckpointError, ConfigError
from tests.golden.fill import check, fill_all, load

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = vggt.VggtEncoder.tiny()


def weights(meta):
    return {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}


@torch.no_grad()
def test_rotary_positions_turn_by_row_and_column():
    meta, inputs, outputs = load(GOLDEN / "vggt_rope2d.json")
    cos, sin = view_blocks.rotary_table(torch.from_numpy(inputs["input.pos"])[:, None], 16, torch.float32)
    have = view_blocks.rotate(torch.from_numpy(inputs["input.q"]), cos, sin)
    check(meta, {"output.y": outputs["output.y"]}, {"output.y": have.numpy()})


@torch.no_grad()
def test_a_block_is_vggts():
    meta, inputs, outputs = load(GOLDEN / "vggt_block.json")
    block = view_blocks.Block(32, 2, qk_norm=True, scale=0.01, eps=1e-5)
    block.load_state_dict(weights(meta))
    rotation = view_blocks.rotary_table(torch.from_numpy(inputs["input.pos"])[:, None], 16, torch.float32)
    check(meta, outputs, {"output.y": block(torch.from_numpy(inputs["input.x"]), rotation).numpy()})


@torch.no_grad()
def test_dinov2_resizes_its_positions_like_vggts():
    meta, inputs, outputs = load(GOLDEN / "vggt_dinov2_small.json")
    config = vggt.VggtConfig(type="vggt", width=32, num_heads=2, dinov2_depth=2, dinov2_image_size=56)
    model = vggt.dinov2(config)
    model.load_state_dict({k: v for k, v in weights(meta).items() if k != "mask_token"})

    def run(block, *arguments):
        return block(*arguments)

    x = model(torch.from_numpy(inputs["input.image"]), run).numpy()
    small = model(torch.from_numpy(inputs["input.image_small"]), run).numpy()
    have = {
        "output.cls": x[:, 0],
        "output.reg": x[:, 1:5],
        "output.patch": x[:, 5:],
        "output.patch_small": small[:, 5:],
    }
    check(meta, outputs, have)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
def test_the_number_of_registers_reaches_the_aggregator_and_its_dinov2(registers):
    encoder = build_encoder(
        encoder_config({**TINY, "patch_embed": "dinov2", "num_registers": registers, "keep_prefix": True}, where="e")
    )
    model = encoder.eval().model
    assert model.patch_embed.register_tokens.shape[1] == model.register_token.shape[2] == registers
    before = encoder(pixels := torch.randn(1, 3, 16, 20))
    assert before.prefix.shape[1] == 1 + registers
    for parameter in (model.patch_embed.register_tokens, model.register_token)[: 2 if registers else 0]:
        parameter.add_(1.0)
    assert torch.equal(encoder(pixels).tokens, before.tokens) == (registers == 0)


def golden_encoder(**changes):
    meta, inputs, outputs = load(GOLDEN / "vggt_aggregator_conv.json")
    sizes = {"width": 32, "num_heads": 2, "depth": 2, "patch_embed": "conv", "image_size": [42, 56]}
    config = encoder_config({"type": "vggt", **sizes, "keep_prefix": True, **changes}, where="encoder")
    encoder = build_encoder(config).eval()
    state = weights(meta)
    encoder.model.load_state_dict({k: v for k, v in state.items() if k in encoder.model.state_dict()})
    image = encoder.config.info.image
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
    return encoder, (torch.from_numpy(inputs["input.images"])[0] - mean) / std, meta, outputs


@torch.no_grad()
def test_two_views_of_a_scene_give_the_aggregators_output():
    encoder, pixels, meta, outputs = golden_encoder(layers=[1, -1])
    features = encoder(pixels, scene_ids=torch.tensor([5, 5]))
    have = torch.cat([features.prefix, features.tokens], dim=1)[None].numpy()
    want = {key: outputs[key] for key in ("output.layer_0", "output.last")}
    check(meta, want, {"output.layer_0": have[..., :64], "output.last": have[..., 64:]})


@torch.no_grad()
def test_scenes_may_be_mixed_up_and_of_different_length():
    encoder, pixels, _, _ = golden_encoder()
    a, b = pixels
    mixed = encoder(torch.stack([b, a, a, b, b]), scene_ids=torch.tensor([9, 4, 9, 4, 7]))
    nine = encoder(torch.stack([b, a]), scene_ids=torch.tensor([0, 0]))
    four = encoder(torch.stack([a, b]), scene_ids=torch.tensor([0, 0]))
    seven = encoder(b[None])
    for index, want in {
        0: nine.tokens[0],
        2: nine.tokens[1],
        1: four.tokens[0],
        3: four.tokens[1],
        4: seven.tokens[0],
    }.items():
        torch.testing.assert_close(mixed.tokens[index], want, rtol=0, atol=1e-5)
    assert (nine.tokens[0] - seven.tokens[0]).abs().max() > 1e-4  # a second view changes the first
    assert (nine.tokens - four.tokens.flip(0)).abs().max() > 1e-4  # and the order counts
    alone = encoder(pixels)
    torch.testing.assert_close(alone.tokens[1], seven.tokens[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_aggregator_is_read_out_of_a_whole_checkpoint(tmp_path):
    torch.manual_seed(0)
    donor = build_encoder(encoder_config(TINY, where="e")).eval()
    state = {f"aggregator.{k}": v.clone() for k, v in donor.model.state_dict().items()}
    state |= {"aggregator.patch_embed.mask_token": torch.zeros(1, 32), "camera_head.trunk.0.weight": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors")
    config = {**TINY, "weights": {"source": str(tmp_path / "model.safetensors")}}
    encoder = build_encoder(encoder_config({**config, "layers": [1]}, where="e")).eval()
    encoder.load_pretrained()
    pixels = torch.randn(2, 3, 16, 20)
    want = build_encoder(encoder_config({**TINY, "layers": [1]}, where="e")).eval()
    want.model.load_state_dict({k: v for k, v in donor.model.state_dict().items() if k in want.model.state_dict()})
    torch.testing.assert_close(encoder(pixels).tokens, want(pixels).tokens)
    with pytest.raises(CheckpointError, match="deeper than depth: 1"):
        build_encoder(encoder_config({**config, "depth": 1}, where="e")).load_pretrained()
    with pytest.raises(CheckpointError, match=r"missing: frame_blocks\.2\."):
        build_encoder(encoder_config({**config, "depth": 3}, where="e")).load_pretrained()


def test_an_encoder_is_read_out_of_the_run_that_trained_it(tmp_path):
    """A checkpoint of ours holds it under model.vision_tower.encoders.NAME; two that fit alike are not guessed between."""
    trained = build_encoder(encoder_config(TINY, where="e"))
    own = {f"model.vision_tower.encoders.geometry.{k}": v.clone() for k, v in trained.state_dict().items()}
    rest = {"lm_head.weight": torch.zeros(2, 2), "model.language_model.norm.weight": torch.zeros(2)}
    save_file(own | rest, tmp_path / "model.safetensors")
    encoder = build_encoder(encoder_config({**TINY, "weights": {"source": str(tmp_path)}}, where="e"))
    encoder.load_pretrained()
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in encoder.state_dict().items())
    save_file({k.replace(".geometry.", ".other."): v for k, v in own.items()}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"2 encoders of the same names .* \(geometry, other\)"):
        encoder.load_pretrained()


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(ConfigError, match=r"encoder\.image_size: \(15, 20\) is no multiple of the patch size 4"):
        encoder_config({**TINY, "image_size": [15, 20]}, where="encoder")
    with pytest.raises(ConfigError, match=r"encoder\.num_heads: 3 does not split width 32"):
        encoder_config({**TINY, "num_heads": 3}, where="encoder")


@torch.no_grad()
def test_a_long_scene_is_read_in_parts_that_each_see_the_reference():
    torch.manual_seed(0)
    whole = build_encoder(encoder_config({**TINY, "keep_prefix": True}, where="encoder")).eval()
    for parameter in whole.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    parted = build_encoder(encoder_config({**TINY, "keep_prefix": True, "chunk": 3}, where="encoder")).eval()
    parted.load_state_dict(whole.state_dict())
    pixels = torch.rand(8, 3, 16, 20)
    ids = torch.tensor([0] * 6 + [1] * 2)
    found = parted(pixels, scene_ids=ids)
    for views, kept in (
        (range(3), slice(0, 3)),
        ((0, 3, 4), slice(1, 3)),
        ((0, 5), slice(1, 2)),
        ((6, 7), slice(0, 2)),
    ):
        alone = whole(pixels[list(views)], scene_ids=torch.zeros(len(views), dtype=torch.long))
        own = list(views)[kept]
        torch.testing.assert_close(found.tokens[own], alone.tokens[kept], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.prefix[own], alone.prefix[kept], atol=1e-5, rtol=1e-5)
    all_at_once = whole(pixels, scene_ids=ids)
    assert not torch.allclose(found.tokens[3:6], all_at_once.tokens[3:6], atol=1e-3), (
        "parts meet in the reference alone"
    )
    short = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    torch.testing.assert_close(
        parted(pixels, scene_ids=short).tokens, whole(pixels, scene_ids=short).tokens, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ConfigError, match="chunk"):
        encoder_config({**TINY, "chunk": 1}, where="encoder")
