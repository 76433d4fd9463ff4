"""Do encoders survive being saved and loaded as parts of a model, under their own names?"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from mllm.encoders.backbones.biformer import BiFormerEncoder
from mllm.encoders.backbones.channelvit import ChannelVitEncoder
from mllm.encoders.backbones.crossvit import CrossVitEncoder
from mllm.encoders.catalogue import encoder_config
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.testing.encoders import sample_pixels

TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
# radio, tipsv2: transformers would save these under other names. eva, beit, dinov3: positions that no file holds.
ENCODERS = {
    "radio": {"type": "hf", "architecture": {"model_type": "radio", **VIT, "max_img_size": 32}},
    "tipsv2": {"type": "hf", "architecture": {"model_type": "tipsv2_vision_model", **VIT}},
    "dinov3": {"type": "hf", "architecture": {"model_type": "dinov3_vit", **VIT, "intermediate_size": 64}},
    "eva": {"type": "timm", "architecture": "eva02_tiny_patch14_224", "options": TIMM, "image_size": 16},
    # Running statistics, two streams, channel by channel.
    "biformer": BiFormerEncoder.tiny(),
    "crossvit": {**CrossVitEncoder.tiny(), "keep_prefix": False},
    "channelvit": ChannelVitEncoder.tiny(),
    "beit": {"type": "timm", "architecture": "beit_base_patch16_224", "options": TIMM, "image_size": 16},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoders = {name: encoder_config(config, where=name) for name, config in ENCODERS.items()}
    config = MllmConfig(text_config=LLAMA, encoders=encoders, connector={"type": "channel_concat"}, image_token_id=63)
    model = MllmForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@torch.no_grad()
def features(model):
    encoders = model.model.vision_tower.encoders.items()
    return {name: encoder(sample_pixels(encoder.config, 2)).tokens for name, encoder in encoders}


def test_features_are_the_same_after_saving_and_loading_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key for key in file.keys() if ".encoders." in key}  # noqa: SIM118 (a file, no mapping)
    assert saved == {key for key in model.state_dict() if ".encoders." in key}
    again = MllmForConditionalGeneration.from_pretrained(tmp_path).eval()
    before, after = features(model), features(again)
    for name in ENCODERS:
        torch.testing.assert_close(before[name], after[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_copy_of_a_model_reads_its_own_layers(model):
    import copy

    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.model.vision_tower.encoders["radio"].parameters():
            parameter.zero_()
    before = features(model)
    assert not features(clone)["radio"].any() and before["radio"].any()
