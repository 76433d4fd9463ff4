"""Are the features of a depth model's backbone those that the model itself works with, read from its own checkpoint?"""

from __future__ import annotations

from inspect import getattr_static, unwrap

import pytest
import torch
from transformers import (
    BeitConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from mllm.encoders.catalogue import build_encoder, catalogue, encoder_config

INDEX = "generate_relative_position_index"
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
PARTS = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
STAGES = [f"stage{number}" for number in (1, 2, 3, 4)]


def depth_anything():
    backbone = Dinov2Config(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, image_size=28, patch_size=14,
        out_features=STAGES, reshape_hidden_states=False,
    )  # fmt: skip
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=32, head_hidden_size=4, **PARTS)
    )


def dpt():
    return DPTForDepthEstimation(
        DPTConfig(**SMALL, image_size=32, patch_size=16, backbone_out_indices=[0, 1, 2, 3], **PARTS)
    )


def zoedepth():
    backbone = BeitConfig(
        **SMALL, image_size=32, patch_size=16, use_relative_position_bias=True, out_features=STAGES,
        reshape_hidden_states=False,
    )  # fmt: skip
    return ZoeDepthForDepthEstimation(
        ZoeDepthConfig(
            backbone_config=backbone, backbone_hidden_size=32, bottleneck_features=8, num_relative_features=4,
            bin_embedding_dim=8, num_attractors=[2, 1, 1, 1],
            bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}], **PARTS,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "make", "side"),
    [("depth-anything-v2-l", depth_anything, 28), ("dpt-l", dpt, 32), ("zoedepth-l", zoedepth, 32)],
    ids=["depth_anything", "dpt", "zoedepth"],
)
@torch.no_grad()
def test_a_depth_models_backbone_is_read_from_its_checkpoint(tmp_path, monkeypatch, entry, make, side):
    torch.manual_seed(0)
    whole = make().eval()
    for parameter in whole.parameters():
        parameter.normal_(std=0.2)  # transformers leaves some of a backbone's as they lay in memory
    whole.save_pretrained(tmp_path)
    architecture = dict(catalogue()[entry]["architecture"])
    architecture |= {key: value for key, value in SMALL.items() if key in architecture} | {"image_size": side}
    spec = {
        "preset": entry, "architecture": architecture, "image_size": side, "layers": [2, -1], "final_norm": False,
        "weights": {"source": str(tmp_path)},
    }  # fmt: skip
    encoder = build_encoder(encoder_config(spec, where="x")).eval()
    encoder.load_pretrained()
    pixels = torch.randn(2, 3, side, side)
    # transformers keeps the index that it computes first, also one on the meta device of whatever ran before.
    found = getattr_static(BeitRelativePositionBias, INDEX)
    static = isinstance(found, staticmethod)
    fresh = unwrap(found.__func__ if static else found)
    monkeypatch.setattr(BeitRelativePositionBias, INDEX, staticmethod(fresh) if static else fresh)
    hidden = whole(pixel_values=pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[2], hidden[4]], dim=-1)[:, 1:]
    torch.testing.assert_close(encoder(pixels).tokens, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_relative_places_are_traced_into_one_graph():
    spec = {"type": "hf", "architecture": {"model_type": "beit", **SMALL, "image_size": 32, "patch_size": 16,
                                           "use_relative_position_bias": True}, "resize": "squash"}  # fmt: skip
    encoder = build_encoder(encoder_config(spec, where="x")).eval()
    for parameter in encoder.parameters():
        parameter.normal_(std=0.2)
    pixels = torch.randn(2, 3, 32, 32)
    plain = encoder(pixels).tokens
    torch.compiler.reset()
    for module in encoder.modules():
        if type(module).__name__ == "BeitLayer":
            module.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(encoder(pixels).tokens, plain, atol=1e-5, rtol=1e-4)
