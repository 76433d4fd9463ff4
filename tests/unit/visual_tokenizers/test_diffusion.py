"""Do diffusion decoders learn what they should, and sample the same picture for the same codes and seed?"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.nn import functional as F

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import DECODER_CONFIG, VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.diffusion.calls import time_ids
from mllm.visual_tokenizers.diffusion.conditioning import Conditions, code_map
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder, decoder_config
from mllm.visual_tokenizers.diffusion.edit import edit, random_masks
from mllm.visual_tokenizers.diffusion.library import build_scheduler, diffusers_class
from mllm.visual_tokenizers.diffusion.objectives import build_objective
from mllm.visual_tokenizers.diffusion.sampling import draw_noise, generators, guided, sample
from mllm.visual_tokenizers.evaluate import psnr
from mllm.visual_tokenizers.recipe import MaskSpec
from tests.unit.visual_tokenizers.diffusion_configs import DECODERS, DIT, SD3, UNET, VAE, tiny_decoder
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

DEEP_VAE = {
    **VAE, "block_out_channels": [4] * 6, "down_block_types": ["DownEncoderBlock2D"] * 6, "up_block_types": ["UpDecoderBlock2D"] * 6,
}  # fmt: skip
ROUNDING = 1e-3
"""Of pixels in [-1, 1]: batches of another size take other sums, which an Euler step from noise of a hundredfold size enlarges."""
SAMPLERS = [("flow_matching", "euler"), ("flow_matching", "heun"), ("epsilon", "ddim"), ("epsilon", "dpm_solver")]


def some_codes(tokenizer: VisualTokenizer, number: int = 3) -> VisualCodes:
    generator = torch.Generator().manual_seed(1)
    books = tokenizer.codebooks.items()
    ids = {
        n: torch.randint(size, (number, tokenizer.num_positions[n], depth), generator=generator)
        for n, (size, depth) in books
    }
    return VisualCodes(ids, tokenizer.grid, tokenizer.scales)


def rows(codes: VisualCodes, *chosen: int) -> VisualCodes:
    return VisualCodes({k: v[list(chosen)] for k, v in codes.codes.items()}, codes.grid, codes.scales)


def test_illumes_published_loop(golden):
    """Conditions from both code maps, guidance and Euler steps, around a fixed denoiser."""
    case = golden("illume_sdxl_decoder_loop")
    ctor, seen = case.meta["ctor"], []
    size = tuple(ctor["latent_hw"])
    vectors = {name: case.inputs[f"quant_{name}"].flatten(2).transpose(1, 2) for name in ("semantic", "pixel")}
    maps = code_map(vectors, {"semantic": (3, 3), "pixel": (4, 4)}, (4, 4), size)
    ids = time_ids(4, 11)

    def denoise(noisy, time, conditions):
        seen.append(conditions.beside(noisy))
        w = case.weights
        told = F.conv2d(seen[-1], w["proj.weight"], w["proj.bias"]) + (time / 1000).view(-1, 1, 1, 1)
        return told + F.linear(ids, w["time.weight"], w["time.bias"])[:, :, None, None]

    noise = {key: ctor["scheduler"][key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    schedule = {**noise, "timestep_spacing": "leading", "steps_offset": 1}
    config = decoder_config({"objective": "epsilon", "sampler": "euler", "schedule": schedule})
    scheduler = build_scheduler(config, ctor["steps"])
    latents = sample(denoise, scheduler, case.inputs["noise"], Conditions(maps), guidance=ctor["guidance_scale"])
    case.check(
        unet_input_step0=seen[0], timesteps=scheduler.timesteps, time_ids=ids, latents=latents, sigmas=scheduler.sigmas,
        init_noise_sigma=scheduler.init_noise_sigma,
    )  # fmt: skip


def test_losses_are_those_computed_by_hand():
    """Flow matching: the network tells n - x of (1 - t) x + t n. Epsilon: n of √ᾱ x + √(1 - ᾱ) n, as `diffusers` adds noise."""
    torch.manual_seed(0)
    pixels = torch.rand(5, 3, 16, 16) * 2 - 1
    for name in ("unet", "dit"):
        decoder = tiny_decoder(name, drop=0.0)
        vectors = decoder.tokenizer.embed(some_codes(decoder.tokenizer, 5))
        torch.manual_seed(7)
        found = decoder.loss(pixels, vectors)
        torch.manual_seed(7)
        if name == "unet":
            times, noise = torch.rand(5) * 1000, torch.randn_like(pixels)
            share = (times / 1000)[:, None, None, None]
            noisy, target = pixels * (1 - share) + noise * share, noise - pixels
        else:
            times, noise = torch.randint(1000, (5,)), torch.randn_like(pixels)
            noisy, target = diffusers_class("DDPMScheduler")().add_noise(pixels, noise, times), noise
        told = decoder.denoise(noisy, times, decoder.conditions(vectors))
        torch.testing.assert_close(found, (told - target).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("objective", "sampler"), SAMPLERS)
def test_a_perfect_network_gives_the_picture_back(objective, sampler):
    config = decoder_config({"objective": objective, "sampler": sampler, "schedule": {}})
    torch.manual_seed(0)
    picture, noise = torch.rand(2, 3, 8, 8) * 1.8 - 0.9, torch.randn(2, 3, 8, 8)
    task, times_seen = build_objective(config), []

    def oracle(noisy, times, conditions):
        """What the training's target is for this picture and the noise that is in ``noisy``."""
        times_seen.append(float(times[0]))
        whole = torch.zeros_like(picture)
        pure, share = (
            task.noisy(whole, torch.ones_like(picture), times),
            task.noisy(torch.ones_like(picture), whole, times),
        )
        inside = (noisy - share * picture) / pure
        return task.target(picture, inside)

    for steps in (1, 4, 10):
        made = sample(oracle, build_scheduler(config, steps), noise, Conditions())
        torch.testing.assert_close(made, picture, rtol=0, atol=2e-3)
    assert max(times_seen) >= 999, "sampling starts where there is (almost) nothing but noise"


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_picture_depends_on_its_codes_and_seed_alone(name):
    decoder = tiny_decoder(name)
    codes = some_codes(decoder.tokenizer)
    whole = decoder.decode(codes, steps=2, guidance=2.0, seed=[5, 6, 7])
    assert (
        whole.shape == (3, 3, decoder.image_side, decoder.image_side)
        and whole.abs().max() <= 1
        and whole.isfinite().all()
    )
    assert torch.equal(whole, decoder.decode(codes, steps=2, guidance=2.0, seed=[5, 6, 7]))
    for place in range(3):
        alone = decoder.decode(rows(codes, place), steps=2, guidance=2.0, seed=5 + place)
        torch.testing.assert_close(alone, whole[place : place + 1], rtol=0, atol=ROUNDING)
    swapped = decoder.decode(rows(codes, 2, 0), steps=2, guidance=2.0, seed=[7, 5])
    torch.testing.assert_close(swapped, whole[[2, 0]], rtol=0, atol=ROUNDING)
    same, other = rows(codes, 0, 0), rows(codes, 1)
    first, second = decoder.decode(same, steps=2, seed=5)
    torch.testing.assert_close(first, second, rtol=0, atol=ROUNDING)
    assert (decoder.decode(same, steps=2, seed=[5, 6])[1] - first).abs().max() > 1e-3, "another seed, another picture"
    assert not torch.equal(decoder.decode(other, steps=2, seed=5)[0], first), "other codes, another picture"


@pytest.mark.parametrize("tokenizer", ["vq", "tokenflow", "dualtoken"])
def test_every_tokenizers_codes_can_be_drawn(tokenizer):
    """One codebook, several scales, two grids of one size: as a map and as a sequence."""
    decoder = tiny_decoder("sd3", tokenizer)
    codes = some_codes(decoder.tokenizer, 2)
    drawn = decoder.decode(codes, steps=2, guidance=2.0)
    assert drawn.shape == (2, 3, 16, 16) and (drawn[0] - drawn[1]).abs().max() > 0, "one noise, two codes"
    loss = decoder.loss(torch.zeros(2, 3, 16, 16), decoder.tokenizer.embed(codes))
    loss.sum().backward()
    assert loss.shape == (2,) and all(p.grad is not None for p in decoder.sequence.parameters())


def test_noise_of_a_picture_is_the_same_in_every_batch():
    noise = draw_noise(generators([3, 4], 2), (3, 4, 4), torch.device("cpu"))
    assert torch.equal(noise[1:], draw_noise(generators(4, 1), (3, 4, 4), torch.device("cpu")))
    sampler = {"sampler": "ddpm", "objective": "epsilon"}
    decoder = tiny_decoder("dit", **sampler)  # draws at every step
    codes = some_codes(decoder.tokenizer, 2)
    both = decoder.decode(codes, steps=3, seed=[8, 9])
    torch.testing.assert_close(decoder.decode(rows(codes, 1), steps=3, seed=9), both[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["unet", "sd3", "latent"])
def test_guidance_one_is_none_and_none_is_without_codes(name):
    decoder = tiny_decoder(name)
    codes = some_codes(decoder.tokenizer, 2)
    seen = decoder.conditions_of(codes)
    noisy, times = torch.randn(2, decoder.channels, *decoder.size), torch.full((2,), 400.0)
    with torch.no_grad():
        given, none = decoder.denoise(noisy, times, seen), decoder.denoise(noisy, times, seen.without())
        torch.testing.assert_close(guided(decoder.denoise, noisy, times[0], seen, 1.0), given)
        torch.testing.assert_close(guided(decoder.denoise, noisy, times[0], seen, 0.0), none, rtol=0, atol=1e-5)
        twice = guided(decoder.denoise, noisy, times[0], seen, 2.0)
        torch.testing.assert_close(twice, 2 * given - none, rtol=0, atol=1e-4)
    hidden = dict.fromkeys(decoder.tokenizer.codebooks, torch.tensor([True, False]))
    reconstruction = decoder.tokenizer.decode(codes)
    dropped = decoder.conditions(decoder.tokenizer.embed(codes), reconstruction=reconstruction, hidden=hidden)
    for part, whole in ((dropped.channels, seen.channels), (dropped.tokens, seen.tokens)):
        if whole is not None:
            assert part[0].abs().max() == 0 and torch.equal(part[1], whole[1]), (
                "what training drops is what guidance leads away from"
            )


def test_codes_are_dropped_as_often_as_asked():
    torch.manual_seed(0)
    decoder = tiny_decoder("unet", drop=0.25, drop_parts={"pixel": 0.5})
    seen = []
    decoder.denoise = lambda noisy, times, conditions: seen.append(conditions.channels) or noisy
    vectors = {
        name: value[:1].expand(400, -1, -1)
        for name, value in decoder.tokenizer.embed(some_codes(decoder.tokenizer)).items()
    }
    decoder.loss(torch.zeros(400, 3, 16, 16), vectors)
    semantic, pixel = seen[0].split(list(decoder.tokenizer.embed_dims.values()), 1)
    shown = [part.flatten(1).abs().amax(1) > 0 for part in (semantic, pixel)]
    assert not (shown[1] & ~shown[0]).any(), "the joint drop takes both"
    assert 0.69 < shown[0].float().mean() < 0.81 and 0.30 < shown[1].float().mean() < 0.45  # 0.75 and 0.375


def test_published_weights_get_new_channels_that_start_at_zero(tmp_path):
    torch.manual_seed(0)
    plain = diffusers_class("UNet2DModel")(in_channels=3, out_channels=3, sample_size=16, **UNET).eval()
    plain.save_pretrained(tmp_path / "unet")
    vae = diffusers_class("AutoencoderKL")(**VAE)
    vae.save_pretrained(tmp_path / "vae")
    decoder = tiny_decoder("unet", settings={}, source=str(tmp_path / "unet"))
    decoder.load_pretrained()
    noisy, times = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 900.0])
    conditions = decoder.conditions_of(some_codes(decoder.tokenizer, 2))
    with torch.no_grad():
        torch.testing.assert_close(
            decoder.denoise(noisy, times, conditions), plain(noisy, times).sample, rtol=0, atol=1e-6
        )
    latent = tiny_decoder("latent", autoencoder={"source": str(tmp_path / "vae")})
    latent.load_pretrained()
    latent.save_pretrained(tmp_path / "saved")
    (tmp_path / "vae" / "config.json").rename(tmp_path / "gone.json")
    again = DiffusionDecoder.from_pretrained(tmp_path / "saved")  # needs the folders of the published parts no more
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in latent.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(latent.autoencoder.state_dict().values(), vae.state_dict().values()))
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mode = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latent.to_space(pixels), (mode - 0.1) * 0.5)
    torch.testing.assert_close(
        latent.to_pixels(latent.to_space(pixels)), vae.decode(mode).sample.clamp(-1, 1), rtol=0, atol=1e-5
    )
    with pytest.raises(CheckpointError, match="holds a UNet2DModel, AutoencoderKL is expected"):
        tiny_decoder("latent", autoencoder={"source": str(tmp_path / "unet")})
    with pytest.raises(CheckpointError, match="does not fit"):
        tiny_decoder("unet", settings={**UNET, "layers_per_block": 2}, source=str(tmp_path / "unet")).load_pretrained()


def test_the_decoder_lies_beside_the_tokenizer(tmp_path):
    decoder = tiny_decoder("sd3")
    codes = some_codes(decoder.tokenizer, 2)
    decoder.save_pretrained(tmp_path / "a")
    tokenizer = VisualTokenizer.from_pretrained(tmp_path / "a")
    assert not tokenizer._diffusion, "read at first use"
    assert torch.equal(tokenizer.decode(codes), decoder.tokenizer.decode(codes)), "the plain way stays what it was"
    torch.testing.assert_close(
        tokenizer.diffusion.decode(codes, steps=2), decoder.decode(codes, steps=2), rtol=0, atol=1e-5
    )
    assert set(tokenizer.state_dict()) == set(decoder.tokenizer.state_dict()), "no part of the tokenizer's own weights"
    tokenizer.save_pretrained(tmp_path / "b")
    again = VisualTokenizer.from_pretrained(tmp_path / "b").diffusion
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in decoder.state_dict().items())
    build_tokenizer(TINY["illume"]).save_pretrained(tmp_path / "a")  # another tokenizer under the decoder
    with pytest.raises(CheckpointError, match="beside another visual tokenizer"):
        DiffusionDecoder.from_pretrained(tmp_path / "a")
    (tmp_path / "b" / DECODER_CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"no diffusion_decoder\.json; a stage of kind diffusion"):
        _ = VisualTokenizer.from_pretrained(tmp_path / "b").diffusion
    with pytest.raises(CheckpointError, match="was not read from a folder"):
        _ = build_tokenizer(TINY["vq"]).diffusion


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"block_out_channel": [8]}}, "did you mean 'block_out_channels'"),
        ({"settings": {**UNET, "in_channels": 4}}, r"settings\.in_channels: follows from"),
        ({"settings": {"block_out_channels": [8] * 6}}, "6 levels halve the 16 × 16 picture 5 times.*at most 5"),
        ({"settings": {**UNET, "norm_num_groups": 5}}, r"settings: diffusers' UNet2DModel refuses them"),
        ({"network": "dit", "settings": {**DIT, "patch_size": 3}}, "3 does not divide the 16 × 16 picture"),
        ({"space": "latent"}, "space latent and autoencoder go together"),
        ({"space": "latent", "autoencoder": {"settings": DEEP_VAE}}, "32 × 32 to one latent, .* fit pictures of 16 × 16"),
        ({"space": "latent", "autoencoder": {"settings": VAE}, "settings": {"block_out_channels": [8] * 5}}, "8 × 8 latent 4.*at most 4"),
        ({"space": "latent", "autoencoder": {"settings": {"latent_channel": 3}}}, "did you mean 'latent_channels'"),
        ({"space": "latent", "autoencoder": {}}, "give settings .* or source"),
        ({"space": "latent", "autoencoder": {"source": "nowhere"}}, "nowhere/config.json does not exist"),
        ({"conditions": ["cross_attention"]}, "no cross attention; use unet_condition"),
        ({"conditions": ["reconstruction"]}, "name channels or cross_attention"),
        ({"conditions": []}, "conditions"),
        ({"sampler": "ddim"}, "'ddim' of flow_matching is one of euler, heun"),
        ({"objective": "epsilon", "times": "logit_normal"}, "for flow_matching"),
        ({"schedule": {"shif": 3.0}}, "did you mean 'shift'"),
        ({"schedule": {"num_train_timesteps": 100}}, "num_train_timesteps: follows from objective flow_matching"),
        ({"objective": "epsilon", "schedule": {"prediction_type": "v_prediction"}}, "prediction_type: follows from"),
        ({"network": "sd3", "settings": {**SD3, "pos_embed_max_size": 2}}, "2 positions a side do not reach over the 4 × 4"),
        ({"drop_parts": {"pixels": 0.1}}, "drop_parts.pixels: the tokenizer has semantic, pixel"),
        ({"nois": 1}, "decoder.nois: unknown key"),
    ],
)  # fmt: skip
def test_a_decoder_that_cannot_be_says_why(changes, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        tiny_decoder("unet", **changes)


def test_settings_of_a_call_that_cannot_be_say_why():
    decoder = tiny_decoder("unet", drop=0.0)
    codes = some_codes(decoder.tokenizer, 2)
    for settings, message in (
        ({"steps": 0}, "steps is 0; 1 or more"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": 2.0}, "trained with drop: 0"),
        ({"seed": [1, 2, 3]}, "3 seeds for 2 pictures"),
    ):
        with pytest.raises(ConfigError, match=message):
            decoder.decode(codes, **settings)
    with pytest.raises(ConfigError, match=r"decoder\.steps: DDIMScheduler takes no 2000"):
        tiny_decoder("dit").decode(codes, steps=2000)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UnavailableError, match=r"a diffusion decoder needs diffusers: .*install .*\[diffusion\]"):
        tiny_decoder()


def test_larger_pictures_than_the_tokenizers():
    decoder = tiny_decoder("large")
    assert (decoder.image_side, decoder.size, decoder.tokenizer.image.height) == (32, (32, 32), 16)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(
        decoder.shrunk(pixels), pixels.unflatten(-1, (16, 2)).unflatten(-3, (16, 2)).mean((-1, -3))
    )
    seen = decoder.conditions_of(some_codes(decoder.tokenizer, 2)).channels
    assert seen.shape == (2, 16 + 3, 32, 32) and torch.equal(seen[:, :16, ::2, ::2], seen[:, :16, 1::2, 1::2])


@pytest.mark.parametrize("name", ["edit", "branch", "dit", "latent"])
def test_an_edit_leaves_what_is_outside_the_mask(name):
    torch.manual_seed(0)
    decoder = tiny_decoder(name)
    codes, pixels = some_codes(decoder.tokenizer, 2), torch.rand(2, 3, 16, 16) * 2 - 1
    mask = torch.zeros(2, 16, 16)
    mask[:, 4:9, 5:12] = 1
    made = edit(decoder, pixels, mask, codes, steps=3, seed=1)
    outside = (mask == 0)[:, None].expand_as(made)
    assert torch.equal(made[outside], pixels[outside]), "what is kept is the source's pixel itself"
    assert (made - pixels)[~outside].abs().mean() > 0.05
    soft = edit(decoder, pixels, mask, codes, steps=3, seed=1, feather=2)
    far = F.max_pool2d(mask[:, None], 5, stride=1, padding=2).expand_as(made) == 0
    assert torch.equal(soft[far], pixels[far]) and not torch.equal(soft, made)
    assert torch.equal(edit(decoder, pixels, mask * 0, codes, steps=2), pixels)
    whole = edit(decoder, pixels, mask * 0 + 1, codes, steps=3, seed=1)
    torch.testing.assert_close(whole, decoder.decode(codes, steps=3, seed=1), rtol=0, atol=1e-5)
    assert (psnr(made, pixels, data_range=2.0) < psnr(torch.where(outside, made, pixels), pixels, data_range=2.0)).all()


def test_edits_that_cannot_be_say_why():
    decoder, pixels = tiny_decoder("edit"), torch.zeros(2, 3, 16, 16)
    codes = some_codes(decoder.tokenizer, 2)
    with pytest.raises(ConfigError, match=r"mask: \(2, 1, 8, 8\); \(B, 1, 16, 16\)"):
        edit(decoder, pixels, torch.zeros(2, 8, 8), codes)
    with pytest.raises(ConfigError, match=r"values are 0 \(kept\) to 1"):
        edit(decoder, pixels, torch.full((2, 16, 16), 2.0), codes)
    with pytest.raises(ConfigError, match=r"pixels: .*; \(B, 3, 16, 16\) is expected"):
        edit(decoder, pixels[..., :8], torch.zeros(2, 16, 16), codes)
    sdxl = tiny_decoder("sdxl")
    with pytest.raises(ConfigError, match="use ddim or dpm_solver"):
        edit(sdxl, pixels, torch.ones(2, 16, 16), codes)


def test_masks_of_training_hide_as_often_as_asked():
    torch.manual_seed(0)
    shares = random_masks(MaskSpec(boxes=(0.25, 0.5), empty=0.2, full=0.1), 500, 16).mean((1, 2, 3))
    assert 0.14 < float((shares == 0).float().mean()) < 0.26 and 0.06 < float((shares == 1).float().mean()) < 0.14
    boxes = shares[(shares > 0) & (shares < 1)]
    assert float(boxes.min()) >= 0.25**2 and float(boxes.max()) <= 0.5**2


def test_the_config_is_plain(tmp_path):
    decoder = tiny_decoder("edit", guidance=2.5, steps=7)
    decoder.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / DECODER_CONFIG).read_text())
    assert (
        stored["guidance"] == 2.5
        and stored["settings"]["block_out_channels"] == [8, 8]
        and stored["type"] == "diffusion"
    )
    assert DiffusionDecoder.from_pretrained(tmp_path).config == decoder.config
