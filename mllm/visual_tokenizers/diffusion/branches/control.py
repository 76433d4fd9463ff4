"""How does a copy of a denoiser, with a condition added behind its first convolution, steer it (ControlNet, arXiv 2302.05543), and read a
text about the condition (DualDiff, arXiv 2505.01857)?

Several stand beside one network, each with a condition of its own, and what they tell is added up.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.visual_tokenizers.diffusion.branches.base import (
    BranchConfig,
    ConditioningBranch,
    Seen,
    Trunk,
    blocks_of,
    take_weights,
)
from mllm.visual_tokenizers.diffusion.branches.context import BlockCopy
from mllm.visual_tokenizers.diffusion.branches.injection import (
    Placement,
    Residuals,
    is_unet,
    picture_blocks,
    placed,
)
from mllm.visual_tokenizers.diffusion.library import diffusers_class
from mllm.visual_tokenizers.diffusion.semantic_fusion import SemanticFusion


class ControlConfig(BranchConfig):
    """A copy of the network that sees what the network sees, and its condition."""

    type: Literal["control"] = "control"
    depth: int | None = Field(default=None, ge=1)
    """Transformers: blocks of the branch; default: all. A U-Net's branch is its whole way down and its middle."""
    placement: Placement = "first"
    """Transformers: first: each of its blocks speaks to the one at its own place. spread: to an equal run of the network's."""
    text: Literal["none", "read", "read_twice"] = "none"
    """What the condition reads of the sequence of codes before it is added: nothing, or by DualDiff's attention in its plain or its "plus"
    form."""
    heads: int = Field(default=8, ge=1)
    """Of that attention."""


class ControlBranch(ConditioningBranch):
    """Beside a transformer (a copy of its first blocks) or a `UNet2DConditionModel` (`ControlNetModel` of `diffusers`)."""

    name = "control"
    Config = ControlConfig
    config: ControlConfig

    def __init__(self, config: ControlConfig, trunk: Trunk, channels: int):
        super().__init__(config, trunk, channels)
        settings: Any = trunk.network.config
        if is_unet(trunk.network):
            if config.depth is not None:
                raise ConfigError("depth: beside a U-Net a control branch is its whole way down; leave depth out")
            self.places, width, patch = 0, int(settings.block_out_channels[0]), 1
            self.copy: nn.Module = diffusers_class("ControlNetModel").from_unet(
                trunk.network, load_weights_from_unet=False
            )
            self.copy.controlnet_cond_embedding = nn.Identity()
        else:
            self.places = len(picture_blocks(trunk.network)[0])
            width = int(settings.num_attention_heads * settings.attention_head_dim)
            patch = int(settings.patch_size)
            self.copy = BlockCopy(trunk.build(trunk.channels, blocks_of(config.depth, self.places)))
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.fuse: SemanticFusion | None = None
        if config.text != "none":
            if trunk.text_width is None:
                raise ConfigError("text: there is no sequence to read; name the condition cross_attention too")
            self.fuse = SemanticFusion(width, trunk.text_width, heads=config.heads, twice=config.text == "read_twice")

    def forward(self, seen: Seen) -> Residuals:
        shown = self.embed(seen.maps.to(self.embed.weight.dtype))
        if self.fuse is not None:
            assert seen.tokens is not None
            shown = self.fuse(shown, seen.tokens)
        if isinstance(self.copy, BlockCopy):
            residuals = self.copy(lambda network: self._with_patches(network, shown, seen))
            return placed(residuals, self.places, placement=self.config.placement, scale=self.config.scale)
        told = seen.call(self.copy, seen.inputs, controlnet_cond=shown)
        parts = [*told.down_block_res_samples, told.mid_block_res_sample]
        return [part * self.config.scale for part in parts]

    def _with_patches(self, network: Any, shown: Tensor, seen: Seen) -> Any:
        """The copy's call, with the condition added to what its patches are."""
        tokens = shown.flatten(2).transpose(1, 2)
        handle = network.pos_embed.register_forward_hook(lambda _module, _args, output: output + tokens)
        try:
            return seen.call(network, seen.inputs)
        finally:
            handle.remove()

    @torch.no_grad()
    def start_from(self, trunk: Trunk) -> None:
        own = self.copy.network if isinstance(self.copy, BlockCopy) else self.copy
        take_weights(own, trunk.network, trunk.channels)

    def networks(self) -> list[nn.Module]:
        return [self.copy.network if isinstance(self.copy, BlockCopy) else self.copy]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two beside a U-Net, which read the codes too."""
        settings = {
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "attention_head_dim": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
        branches = {
            "edit": {"type": "control", "text": "read", "heads": 2},
            "whole": {"type": "control", "sees": ["reconstruction"], "text": "read_twice", "heads": 2},
        }
        conditions = ["cross_attention", "reconstruction", "source"]
        return {"network": "unet_condition", "settings": settings, "conditions": conditions, "branches": branches}
