"""Which tiny tokenizers do the tests build?"""

from __future__ import annotations

from typing import Any

CONV = {"channels": 16, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 8}
VIT = {"type": "small_vit", "image_size": 16, "patch_size": 4, "width": 24, "depth": 1, "heads": 2}
HEAD = {"teacher_dim": 24, "width": 24, "depth": 1, "heads": 2}
SHARED = {"type": "vq", "size": 32, "parts": {"semantic": 8, "pixel": 4}, "l2_norm": True}
RESIDUAL = {"type": "residual", "size": 16, "dim": 8, "depth": 2}

TINY: dict[str, dict[str, Any]] = {
    "vq": {
        "type": "vq", "image_size": 16, "encoder": CONV, "z_channels": 16,
        "quantizer": {"type": "vq", "size": 32, "parts": {"pixel": 8}},
    },
    "tokenflow": {
        "type": "tokenflow", "image_size": 16, "student": VIT, "encoder": CONV, "z_channels": 16,
        "quantizer": {"type": "multi_scale", "scales": [1, 2, 4], "inner": SHARED}, "semantic_head": HEAD,
    },
    "dualtoken": {
        "type": "dualtoken",
        "vision": {
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": 16, "patch_size": 4,
        },
        "layer_pixel": 1, "layer_semantic": 2, "pixel_quantizer": RESIDUAL, "semantic_quantizer": RESIDUAL,
        "decoder": {**CONV, "multipliers": [1, 2]}, "decoder_channels": 32, "decoder_grid": [8, 8],
    },
    "illume": {
        "type": "illume", "image_size": 16, "semantic_encoder": {**VIT, "patch_size": 8}, "semantic_width": 16,
        "semantic_depth": 1, "semantic_heads": 2,
        "semantic_quantizer": {
            "type": "vq", "size": 16, "parts": {"semantic": 8}, "codebook": {"learn": "frozen_linear"},
        },
        "pixel_encoder": {**CONV, "sampling": "shuffle"}, "z_channels": 16,
        "pixel_quantizer": {"type": "vq", "size": 32, "parts": {"pixel": 8}, "codebook": {"learn": "frozen_linear"}},
        "decoder": CONV, "noise_images": 0.5, "noise_positions": 0.5,
    },
}  # fmt: skip
