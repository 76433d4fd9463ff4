"""Does a branch tell a denoiser what VideoPainter's does, and nothing before it is trained?"""

from __future__ import annotations

import pytest
import torch

from mllm.errors import ConfigError
from mllm.visual_tokenizers.diffusion.branches.context import BlockCopy
from mllm.visual_tokenizers.diffusion.branches.injection import injected, placed, untouched_patches
from mllm.visual_tokenizers.diffusion.calls import called
from tests.unit.visual_tokenizers.diffusion_configs import DIT, tiny_decoder

pytest.importorskip("diffusers")

DIT_BRANCH = {"settings": {**DIT, "num_layers": 3}, "conditions": ["channels", "source"], "branch": {"depth": 2}}


def cogvideox(sizes: dict, *, channels: int, layers: int) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=sizes["heads"],
        attention_head_dim=sizes["head_dim"],
        in_channels=channels,
        out_channels=sizes["latent"],
        num_layers=layers,
        time_embed_dim=sizes["time_embed_dim"],
        text_embed_dim=sizes["text_dim"],
        sample_width=sizes["width"],
        sample_height=sizes["height"],
        sample_frames=4 * (sizes["frames"] - 1) + 1,
        patch_size=sizes["patch"],
        max_text_seq_length=sizes["text_len"],
        use_rotary_positional_embeddings=sizes["rotary"],
    ).eval()


@torch.no_grad()
def test_residuals_and_their_places_are_videopainters(golden):
    case = golden("videopainter_context_branch")
    sizes, x = case.meta["ctor"], case.inputs
    trunk = cogvideox(sizes, channels=2 * sizes["latent"], layers=sizes["layers"])
    branch = BlockCopy(cogvideox(sizes, channels=2 * sizes["latent"] + 1, layers=sizes["branch_layers"]))
    given, own = {}, {}
    for name, value in case.weights.items():
        part, _, rest = name.partition(".")
        if part == "transformer":
            given[rest] = value
        elif not rest.startswith("branch_x_embedder"):
            own[rest.replace("branch_blocks", "project") if "branch_blocks" in rest else f"network.{rest}"] = value
    trunk.load_state_dict(given, strict=True)
    branch.load_state_dict(own, strict=True)

    def run(network, *maps):
        rotary = (x["rope_cos"], x["rope_sin"])
        return network(torch.cat(maps, 2), x["text"], x["timestep"], image_rotary_emb=rotary).sample

    def told(samples, **how):
        how = {"placement": "spread", **how}
        with injected(trunk, placed(samples, sizes["layers"], **how)):
            return run(trunk, x["noisy"], x["image"])

    samples = branch(lambda network: run(network, x["noisy"], x["masked"], x["mask"]))
    case.check(
        none=run(trunk, x["noisy"], x["image"]),
        sample0=samples[0],
        sample1=samples[1],
        spread=told(samples),
        first=told(samples, placement="first"),
        spread_masked=told(samples, keep=untouched_patches(x["mask"], sizes["patch"])),
        half=told(samples, scale=0.5),
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), [("branch", {}), ("dit", DIT_BRANCH)])
def test_a_branch_changes_nothing_at_first_and_only_outside_the_mask_later(name, changes):
    torch.manual_seed(0)
    decoder = tiny_decoder(name, **changes)
    assert not {p.data_ptr() for p in decoder.branches.parameters()} & {
        p.data_ptr() for p in decoder.network.parameters()
    }
    noisy, times = torch.randn(1, 3, 16, 16), torch.tensor([500.0])
    kept = torch.randn(1, 4, 16, 16)
    kept[:, 0] = 0
    kept[:, 0, :4, :5] = 1
    vectors = {
        book: torch.randn(1, decoder.tokenizer.grids[book][0] * decoder.tokenizer.grids[book][1], width)
        for book, width in decoder.tokenizer.embed_dims.items()
    }
    seen = decoder.conditions(vectors, kept=kept)
    plain = called(decoder.network, decoder.config, seen.beside(noisy, kept=False), times, seen.tokens).sample
    assert torch.equal(decoder.denoise(noisy, times, seen), plain), "an untrained branch changes what the network tells"
    for layer in decoder.branches["context"].copy.project:
        torch.nn.init.normal_(layer.weight, std=0.5)
    moved = decoder.denoise(noisy, times, seen)
    assert not torch.allclose(moved, plain, atol=1e-3)
    all_hidden = decoder.conditions(vectors, kept=torch.cat([torch.ones_like(kept[:, :1]), kept[:, 1:]], 1))
    assert torch.equal(decoder.denoise(noisy, times, all_hidden), plain), "nothing is kept, so nothing may be added"


def test_patches_are_outside_when_no_pixel_of_them_is_inside():
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., 1, 2] = 0.01
    assert untouched_patches(mask, 2).tolist() == [[True, False, True, True, True, True]]


def test_every_parameter_of_a_branch_gets_a_gradient():
    decoder = tiny_decoder("branch").train()
    vectors = {
        book: torch.randn(2, decoder.tokenizer.grids[book][0] * decoder.tokenizer.grids[book][1], width)
        for book, width in decoder.tokenizer.embed_dims.items()
    }
    decoder.loss(torch.rand(2, 3, 16, 16) * 2 - 1, vectors, kept=torch.zeros(2, 4, 16, 16)).mean().backward()
    missing = [name for name, p in decoder.branches.named_parameters() if p.grad is None]
    assert not missing
    assert all(layer.weight.grad.abs().sum() > 0 for layer in decoder.branches["context"].copy.project)


def test_a_branch_that_cannot_be_says_why():
    with pytest.raises(ConfigError, match=r"branches go beside network dit, sd3 or unet_condition"):
        tiny_decoder("edit", branch={"depth": 1})
    with pytest.raises(ConfigError, match=r"decoder\.branches\.context\.depth: 4 blocks beside a network of 3"):
        tiny_decoder("branch", branch={"depth": 4})
