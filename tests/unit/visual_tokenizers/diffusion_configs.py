"""Which tiny diffusion decoders do the tests build?"""

from __future__ import annotations

from typing import Any

from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

_PLAIN = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
UNET = {
    **_PLAIN, "add_attention": False, "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}  # fmt: skip
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4}
SD3 = {
    **DIT,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
}
CROSS = {
    **_PLAIN, "cross_attention_dim": 12, "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SDXL = {
    **CROSS, "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32,
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 8], "latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.1,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "unet": {"network": "unet", "settings": UNET},
    "dit": {"network": "dit", "settings": DIT, "objective": "epsilon"},
    "sd3": {"network": "sd3", "settings": SD3, "conditions": ["cross_attention", "channels"], "times": "logit_normal"},
    "latent": {
        "network": "unet_condition", "settings": CROSS, "space": "latent", "autoencoder": {"settings": VAE}, "objective": "epsilon",
        "conditions": ["cross_attention", "reconstruction"], "sampler": "dpm_solver",
    },
    "large": {"network": "unet", "settings": UNET, "scale": 2, "conditions": ["channels", "reconstruction"]},
    "edit": {"network": "unet", "settings": UNET, "conditions": ["channels", "source"]},
    "branch": {
        "network": "sd3", "settings": {**SD3, "num_layers": 3}, "conditions": ["channels", "source"], "branch": {"depth": 2},
    },
    "sdxl": {"network": "unet_condition", "settings": SDXL, "objective": "epsilon", "sampler": "euler", "size_index": 11},
}  # fmt: skip
"""Every network, space, objective and condition at least once."""


def tiny_decoder(name: str = "unet", tokenizer: str = "illume", **changes: Any) -> DiffusionDecoder:
    """A decoder in evaluation mode beside a tiny tokenizer of 16 pixels."""
    return DiffusionDecoder({**DECODERS[name], **changes}, build_tokenizer(TINY[tokenizer]).eval()).eval()
