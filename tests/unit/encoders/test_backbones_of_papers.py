"""Do the backbones that only papers describe do what these say: volumes, chosen patches, latents that gather and scatter, depth?"""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from mllm.encoders.backbones import channelvit, gldmnet, jointtokens, uni4eye
from mllm.encoders.catalogue import build_encoder, catalogue, encoder_config
from mllm.errors import CheckpointError, ConfigError
from mllm.processing.panels import stack_channels
from mllm.processing.pixels import to_pixels
from mllm.testing.encoders import build_example, check_description, check_encoder, resolve_example, sample_pixels
from tests.unit.encoders.test_backbones import refused

EYE = uni4eye.Uni4EyeEncoder.tiny()
POSE = jointtokens.EvitPoseEncoder.tiny()
UNI = jointtokens.UniTransPoseEncoder.tiny()
DEPTH = gldmnet.GlDmNetEncoder.tiny()


def test_what_is_of_papers_or_third_parties_is_named_so():
    kinds = ("dependencyvit", "vir", "dualtokenvit", "lookupvit", "uni4eye", "evitpose", "unitranspose", "gldmnet")
    of_papers = {name: entry for name, entry in catalogue().items() if entry["type"] in kinds}
    assert {entry["type"] for entry in of_papers.values()} == set(kinds)
    for name, entry in of_papers.items():
        assert entry["note"].startswith(("paper only", "third party")), name
        assert entry["weights"]["source"].startswith("./"), "no published weights are claimed"


# Uni4Eye --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pictures_and_volumes_share_a_vit_and_scenes_tell_them_apart():
    encoder = build_example(resolve_example(EYE))
    pixels = sample_pixels(encoder.config, 6)
    scenes = torch.tensor([7, 3, 7, 5, 7, 3])  # a volume of three slices, one of two, a picture
    found = encoder(pixels, scene_ids=scenes)
    assert found.tokens.shape == (6, 20, 24) and found.prefix.shape == (6, 1, 24)
    torch.testing.assert_close(found.tokens[3], encoder(pixels[3:4]).tokens[0])
    # Slices 0 and 2 of the volume are one group; slice 4 is the next one, filled up with itself.
    torch.testing.assert_close(found.tokens[0], found.tokens[2])
    volume = pixels[[0, 2, 4, 4]].transpose(0, 1)[None]
    whole = encoder.model(volume)[-1]
    torch.testing.assert_close(found.tokens[[0, 4]].flatten(0, 1), whole[0, 1:])
    torch.testing.assert_close(found.prefix[4, 0], whole[0, 0])
    other = pixels.clone()
    other[4] = 0
    moved = encoder(other, scene_ids=scenes).tokens
    assert not torch.allclose(moved[0], found.tokens[0]) and torch.allclose(moved[1], found.tokens[1], atol=1e-5)
    tiles = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [-1, -1], [-1, -1]])
    apart = encoder(pixels, scene_ids=torch.zeros(6, dtype=torch.long), places=tiles)
    torch.testing.assert_close(apart.tokens[:4], encoder(pixels[:4]).tokens)
    longer = encoder(sample_pixels(encoder.config, 16), scene_ids=torch.zeros(16, dtype=torch.long))
    assert torch.isfinite(longer.tokens).all(), "a volume of more slices than the positions were made for"


def test_a_volume_teaches_its_own_projection_and_checkpoints_as_pictures_do():
    encoder = build_example(resolve_example(EYE)).train()
    pixels, scenes = sample_pixels(encoder.config, 4), torch.zeros(4, dtype=torch.long)
    encoder(pixels, scene_ids=scenes).tokens.square().sum().backward()
    plain = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    assert plain["model.patch_embed.proj_3d.weight"].any() and "model.patch_embed.proj.weight" not in plain
    encoder.zero_grad()
    encoder.set_gradient_checkpointing(True)
    encoder(pixels, scene_ids=scenes).tokens.square().sum().backward()
    torch.testing.assert_close(encoder.model.patch_embed.proj_3d.weight.grad, plain["model.patch_embed.proj_3d.weight"])


@torch.no_grad()
def test_a_masked_autoencoders_weights_open_and_a_still_volume_is_seen_as_its_picture(tmp_path):
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
    ).eval()
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    state |= {
        "mask_token": torch.zeros(1, 1, 24),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "head.weight": torch.zeros(3, 24),
    }
    save_file(state, tmp_path / "mae.safetensors")
    spec = {**EYE, "image_size": 16, "weights": {"source": str(tmp_path / "mae.safetensors")}}
    encoder = build_encoder(encoder_config(spec, where="e")).eval()
    encoder.load_pretrained()
    pixels = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(encoder(pixels).tokens, vit.forward_features(pixels)[:, 1:], rtol=1e-4, atol=1e-5)
    encoder.model.patch_embed.depth_embed_3d.zero_()
    still = encoder(pixels.expand(2, -1, -1, -1), scene_ids=torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(still.tokens[:1], encoder(pixels).tokens, rtol=1e-4, atol=1e-5)
    half = {name: value for name, value in state.items() if "blocks.1" not in name}
    save_file(half, tmp_path / "mae.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\."):
        encoder.load_pretrained()


# EViTPose and UniTransPose --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_joints_choose_the_patches_that_are_worked_on():
    some = build_example(resolve_example({**POSE, "keep": 0.4, "final_norm": False}))
    every = build_example(resolve_example({**POSE, "keep": 1.0, "final_norm": False}))
    pixels = sample_pixels(some.config, 3)
    before, after = some.model(pixels)[1], some.model(pixels)[-1]
    still = (before[:, 5:] == after[:, 5:]).all(-1)
    assert still.sum(1).tolist() == [12, 12, 12], "8 of 20 patches are worked on, the others stay as they were"
    scores = some.model.scores(before)
    assert bool((scores.masked_fill(still, torch.inf).amin(1) >= scores.masked_fill(~still, -torch.inf).amax(1)).all())
    assert not torch.allclose(every.model(pixels)[-1][:, 5:][still], after[:, 5:][still])
    torch.testing.assert_close(every.model(pixels)[1], before)
    refused({**POSE, "choose_after": 3}, "choose_after: no block comes after block 3 of 3", "keep: 1")


@torch.no_grad()
def test_windows_are_wide_open_through_the_latents_only():
    """Beside a far change a patch of another window moves by what the latents carried, and by nothing without them."""
    for latents in ("learned", "pooled"):
        spec = {**UNI, "latents": latents, "num_latents": 4, "layers": [1], "depths": [1, 1, 1, 1]}
        encoder = build_example(resolve_example(spec))
        block = encoder.model.stages[0][0]
        x, given = torch.randn(1, 7, 8, 8), torch.randn(1, 4, 8)
        moved = x.clone()
        moved[:, 6, 7] = torch.randn(8)
        for parameter in block.wide.parameters():
            parameter.copy_(torch.randn_like(parameter))
        far, (y, _), (z, _) = (0, 0, 0), block(x, given), block(moved, given)
        assert not torch.allclose(y[far], z[far], atol=1e-4)
        block.wide.scatter.proj.weight.zero_()
        torch.testing.assert_close(block(x, given)[0][far], block(moved, given)[0][far])
    grid = torch.arange(35.0).view(1, 5, 7, 1)
    windows = jointtokens.Windows(1, 1, 3)
    for layer in (windows.qkv, windows.proj):
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    windows.qkv.weight[:2] = 0  # a mean over what is seen
    want = [[grid[0, r : r + 3, c : c + 3].mean() for c in (0, 3, 6)] for r in (0, 3)]
    found = windows(grid)[0, :, :, 0]
    torch.testing.assert_close(found[::3, ::3], torch.tensor(want))
    refused({**UNI, "latents": "pooled", "num_latents": 5}, "5 is no square number")
    refused({**UNI, "image_size": 72}, "72 x 72 is no multiple of 32")


@pytest.mark.parametrize(
    "spec",
    [
        {**UNI, "latents": "pooled", "num_latents": 4, "layers": [2, 3]},
        {**UNI, "image_size": [96, 64], "window": 7, "keep_prefix": False},
        {**DEPTH, "output": "fused", "layers": [2, -1]},
        {**DEPTH, "cnn": "resnet50", "cnn_channels": [4, 4, 8, 8], "decoder_depth": 2},
        {**EYE, "layers": [0, -1], "patch_depth": 3, "keep_prefix": False},
    ],
    ids=["pooled", "large-window", "fused", "resnet50", "two-layers"],
)
def test_other_settings_keep_the_contract(spec):
    check_encoder(spec)


# Channels beyond three ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_colour_and_depth_reach_their_streams_through_the_processors_pixels():
    encoder = build_example(resolve_example({**DEPTH, "output": "fused"}))
    image = encoder.config.info.image
    assert (image.height, image.width, image.panels) == (64, 64, 2)
    generator = torch.Generator().manual_seed(0)
    colour = torch.rand(40, 50, 3, generator=generator).numpy()
    depth = torch.rand(40, 50, generator=generator).numpy()
    pixels = to_pixels(stack_channels([colour, depth[..., None].repeat(3, axis=2)]), image)[None]
    seen = []
    for stream in encoder.model.streams:
        stream[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = encoder(pixels).tokens
    assert [tuple(x.shape) for x in seen] == [(1, 3, 32, 64), (1, 1, 32, 64)]
    other = pixels.clone()
    other[:, :, 32:] = 0
    assert not torch.allclose(encoder(other).tokens, found)
    torch.testing.assert_close(seen[0], seen[2])
    refused({**DEPTH, "panels": 3}, "panels")
    refused({**DEPTH, "image_size": 40}, "40 x 40 is no multiple of 32")
    refused({**DEPTH, "layers": [2]}, "set output: fused")


@torch.no_grad()
def test_channelvit_sees_as_many_channels_as_the_panels_hold():
    spec = {
        **channelvit.ChannelVitEncoder.tiny(),
        "panels": 2,
        "channels": [4, 0, 2, 1],
        "merge": "mean",
        "image_size": [16, 20],
    }
    config = resolve_example(spec)
    check_description(config)
    encoder = build_example(config)
    pixels = sample_pixels(config, 2)
    assert tuple(pixels.shape) == (2, 3, 32, 20)
    planes = torch.cat([pixels[:, :, :16], pixels[:, :, 16:]], dim=1)[:, :4]
    torch.testing.assert_close(encoder(pixels).tokens, encoder(planes).tokens)
    with pytest.raises(ConfigError, match=r"expected pixels \(B, 4, 16, 20\), got \(2, 6, 16, 20\)"):
        encoder(torch.zeros(2, 6, 16, 20))
    refused({**spec, "panels": 1}, "4 channels are more than the 3 of an image of panels: 1; set panels: 2")
