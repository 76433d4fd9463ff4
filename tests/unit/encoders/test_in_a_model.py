"""Do encoders survive being saved and loaded as parts of a model, under their own names?"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from mllm.encoders.backbones.biformer import BiFormerEncoder
from mllm.encoders.backbones.channelvit import ChannelVitEncoder
from mllm.encoders.backbones.crossvit import CrossVitEncoder
from mllm.encoders.backbones.s4d import S4dEncoder
from mllm.encoders.backbones.snnet import SnNetEncoder
from mllm.encoders.catalogue import encoder_config
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.encoder_losses import encoder_costs
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


def test_an_encoders_own_loss_is_added_once_and_its_cost_is_told():
    """By its batch's share of the step's learned tokens, so that more micro-batches do not make it weigh more."""
    encoders = {
        "experts": encoder_config({**S4dEncoder.tiny(), "balance_weight": 2.0}, where="e"),
        "routes": encoder_config({**SnNetEncoder.tiny(), "keep_prefix": False}, where="e"),
    }
    config = MllmConfig(text_config=LLAMA, encoders=encoders, connector={"type": "channel_concat"}, image_token_id=63)
    torch.manual_seed(0)
    model = MllmForConditionalGeneration(config).train()
    bank = model.model.vision_tower
    pixels = {model.config.pixel_keys[name] if hasattr(model.config, "pixel_keys") else f"pixel_values_{name}": sample_pixels(e.config, 1)
              for name, e in bank.encoders.items()}  # fmt: skip
    first = next(iter(pixels))
    pixels["pixel_values"] = pixels.pop(first)
    tokens = model.config.layout((16, 20)).num_tokens
    ids = torch.tensor([[1, *[63] * tokens, 5, 6, 7, 8]])
    labels = ids.clone()
    labels[:, : 1 + tokens] = -100
    found = model(input_ids=ids, labels=labels, **pixels)
    balance = found.losses["encoders.experts/balance"]
    assert float(balance) != 0.0
    bank.encoders["experts"].config.balance_weight = 0.0
    without = model(input_ids=ids, labels=labels, **pixels)
    assert without.losses is None
    torch.testing.assert_close(found.loss, without.loss + balance)
    bank.encoders["experts"].config.balance_weight = 2.0
    part = model(input_ids=ids, labels=labels, num_items_in_batch=8, **pixels)
    torch.testing.assert_close(part.loss, found.loss / 2)
    part.loss.backward()
    assert bank.encoders["experts"].model.blocks[1].moe.router.topkroute_linear.weight.grad.any()
    costs = encoder_costs(model)
    assert set(costs) == {"routes"} and costs["routes"]["gflops"] > 0
    assert model.eval()(input_ids=ids, labels=labels, **pixels).losses is None
