"""Does every registered encoder keep the contract, and does every shipped entry build offline?"""

from __future__ import annotations

import functools

import pytest
import torch

from mllm.encoders import ENCODERS
from mllm.encoders.catalogue import build_encoder, catalogue, encoder_config
from mllm.encoders.shapes import OnlyShapes
from mllm.testing.encoders import CHECKS, check_encoder, resolve_example

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT = {**SIZES, "image_size": 16, "patch_size": 4}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 64}
SAM = {**VIT, "window_size": 2, "global_attn_indexes": [2], "output_channels": 8, "mlp_dim": 64}

HF = {
    "clip": {"model_type": "clip", "vision_config": {**VIT, "intermediate_size": 64}},
    "siglip": {"model_type": "siglip_vision_model", **VIT, "intermediate_size": 64},
    "siglip2": {
        "model_type": "siglip2_vision_model",
        **SIZES,
        "intermediate_size": 64,
        "num_patches": 16,
        "patch_size": 4,
    },
    "dinov2": {"model_type": "dinov2", **VIT},
    "dinov2-registers": {"model_type": "dinov2_with_registers", **VIT},
    "dinov3": {"model_type": "dinov3_vit", **VIT, "intermediate_size": 64, "num_register_tokens": 4},
    "dinov3-convnext": {"model_type": "dinov3_convnext", **STAGES},
    "convnext": {"model_type": "convnext", **STAGES},
    "radio": {"model_type": "radio", **VIT, "max_img_size": 32},
    "tipsv2": {"model_type": "tipsv2_vision_model", **VIT},
    "pix2struct": {
        "model_type": "pix2struct_vision_model",
        **SIZES,
        "d_ff": 64,
        "d_kv": 16,
        "patch_embed_hidden_size": 48,
        "seq_len": 64,
    },
    "vit": {"model_type": "vit", **VIT, "intermediate_size": 64},
    "sam": {"model_type": "sam_vision_model", **SAM},
    "aimv2": {"model_type": "aimv2_vision_model", **VIT, "intermediate_size": 64},
    "mlcd": {"model_type": "mlcd_vision_model", **VIT, "intermediate_size": 64},
}
TIMM = {
    "siglip": ("vit_so400m_patch14_siglip_384", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
    "eva02": ("eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
    "beit": ("beit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
    "sam": (
        "samvit_base_patch16",
        {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 2,
            "neck_chans": 16,
            "global_attn_indexes": [1],
        },
        16,
    ),
    "convnext": ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, 64),
    "convnext-clip": ("convnext_base.clip_laion2b", {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, 64),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2},
        32,
    ),
    "davit": ("davit_tiny", {"embed_dims": [16, 32], "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}, 32),
    "vitamin": ("vitamin_small_224", {"depth": 2}, 64),
    "resnet": ("resnet18", {"channels": [8, 16, 24, 32]}, 64),
}
# Families that the catalogue takes from timm in one line: the shipped entry, and options that make its architecture tiny.
ONE_LINE = {
    "fastvit-mci2": ({"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64)}, 64),
    "fastvithd-1024": ({"layers": (1, 1, 1, 1, 1), "embed_dims": (32, 32, 64, 64, 64)}, 128),
    "hiera-b-mae": ({"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1)}, 64),
    "swinv2-b-384": ({"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2), "window_size": 4}, 32),
    "maxvit-b-384": ({"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "stem_width": 16}, 64),
    "convnextv2-b-384": ({"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, 64),
    "efficientnetv2-m-384": ({"channel_multiplier": 0.2, "depth_multiplier": 0.2}, 64),
    "efficientformerv2-s2": ({"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 24, 32)}, 64),
    "sam2-hiera-l": ({"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}, 64),
    "pe-core-l-336": ({"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
    "pe-spatial-l-448": ({"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
    "aimv2-l-448": ({"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
    "ijepa-h-448": ({"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}, 16),
}


def test_there_are_encoders_to_test():
    assert len(ENCODERS) >= 6 and len(catalogue()) >= 25


@functools.cache
def _example(name):
    """Resolved once for all checks: that runs a forward pass on the meta device, and for some takes seconds."""
    return resolve_example(name)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"encoder {name}")) for name in ENCODERS]
)
def test_every_registered_encoder_keeps_the_contract(name, check):
    check(_example(name))


@pytest.mark.parametrize("name", HF)
def test_model_families_of_transformers_keep_the_contract(name):
    config = {"type": "hf", "architecture": HF[name]}
    if name == "pix2struct":
        config["image_size"] = 20
    assert len(check_encoder(config)) == len(CHECKS)


@pytest.mark.parametrize("name", TIMM)
def test_model_families_of_timm_keep_the_contract(name):
    architecture, options, size = TIMM[name]
    config = {"type": "timm", "architecture": architecture, "options": options, "image_size": size}
    assert len(check_encoder(config)) == len(CHECKS)


@pytest.mark.parametrize("name", catalogue())
def test_every_shipped_entry_builds_offline_and_runs_at_its_own_size(name):
    config = encoder_config(name, where="encoders.x")
    entry = catalogue()[name]
    assert entry["capability"] and config.info is not None
    assert config.weights is not None and config.weights.licence
    with torch.device("meta"), OnlyShapes():
        encoder = build_encoder(config)
    # `resolve` has run it once, to measure its sizes; again, on a batch, the first entry of every type.
    if name == next(other for other, its in catalogue().items() if its["type"] == entry["type"]):
        with torch.device("meta"), OnlyShapes(), torch.no_grad():
            features = encoder(torch.zeros(2, 3, config.info.image.height, config.info.image.width))
        assert tuple(features.tokens.shape) == (2, config.info.grid[0] * config.info.grid[1], config.info.width)
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    assert millions == pytest.approx(entry["about"]["millions"], rel=0.01), "about.millions tells the size wrongly"
    parameters = [name for name, _ in encoder.named_parameters()]
    groups = [tuple(prefixes) for _, prefixes in encoder.layer_groups()]
    grouped = [sum(name.startswith(prefixes) for prefixes in groups) for name in parameters]
    assert grouped == [1] * len(parameters)


def test_families_taken_from_timm_in_one_line_see_and_learn():
    for name, (options, size) in ONE_LINE.items():
        architecture = catalogue()[name]["architecture"].partition(".")[0]
        spec = {"type": "timm", "architecture": architecture, "options": options, "image_size": size, "layers": [-1]}
        if name == "efficientnetv2-m-384":
            spec["final_norm"] = False
        encoder = build_encoder(encoder_config(spec, where=name)).eval()
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        features = encoder(pixels)
        info = encoder.config.info
        assert tuple(features.tokens.shape) == (2, info.grid[0] * info.grid[1], info.width), name
        features.tokens.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters()), name
        with torch.no_grad():
            alone = encoder(pixels[:1]).tokens
        torch.testing.assert_close(alone, features.tokens[:1].detach(), rtol=1e-3, atol=1e-4, msg=name)
