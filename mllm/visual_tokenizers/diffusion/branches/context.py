"""How does a small copy of a denoiser's first blocks tell it of a condition, and change nothing before it is trained (VideoPainter,
arXiv 2503.05639)?

Written from a description of TencentARC/VideoPainter, whose licence allows research and education only, and checked by its numbers; its
weights are not for us to ship.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mllm.visual_tokenizers.diffusion.branches.base import (
    BranchConfig,
    ConditioningBranch,
    Seen,
    Trunk,
    blocks_of,
    silent,
    take_weights,
)
from mllm.visual_tokenizers.diffusion.branches.injection import (
    Placement,
    Residuals,
    picture_blocks,
    placed,
    untouched_patches,
)


class ContextConfig(BranchConfig):
    """A copy of the network's first blocks that sees more than the network does."""

    type: Literal["context"] = "context"
    depth: int = Field(default=2, ge=1)
    """Blocks of the branch."""
    placement: Placement = "spread"
    """spread: each of its blocks speaks to an equal run of the network's. first: to the one at its own place."""
    outside_only: bool = True
    """Speak only where a patch lies wholly outside what is made anew, as published."""

    @model_validator(mode="after")
    def _knows_the_mask(self) -> ContextConfig:
        if self.outside_only and "source" not in self.sees:
            raise ValueError(
                "outside_only is for a branch that sees source, which has the mask; give outside_only: false"
            )
        return self


class BlockCopy(nn.Module):
    """The first blocks of a transformer, and a linear layer behind each that starts at zero.

    network: of the trunk's class with as many blocks as the copy has, and its own input channels. Its last layers run for nothing; they
    get gradients of zero, as all ranks expect.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        config: Any = network.config
        width = int(config.num_attention_heads * config.attention_head_dim)
        self.project = nn.ModuleList(silent(width) for _ in picture_blocks(network)[0])

    def forward(self, run: Callable[[nn.Module], Any]) -> list[Tensor]:
        """One residual ``(B, N, C)`` for each of its blocks. run: calls the network that it is given with whatever it takes."""
        blocks, place = picture_blocks(self.network)
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(output if place is None else output[place])

        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_hook(keep).remove)
            told = run(self.network)
        residuals = [layer(hidden) for layer, hidden in zip(self.project, seen)]
        residuals[0] = residuals[0] + 0.0 * getattr(told, "sample", told).sum()
        return residuals


class ContextBranch(ConditioningBranch):
    """Beside a transformer. Of the trunk it starts with copies. (The published branch shares memory with the trunk here, and its own masked
    picture starts like the noisy one; here all that only the branch sees starts at zero.)"""

    name = "context"
    Config = ContextConfig
    config: ContextConfig

    def __init__(self, config: ContextConfig, trunk: Trunk, channels: int):
        super().__init__(config, trunk, channels)
        self.places = len(picture_blocks(trunk.network)[0])
        depth = blocks_of(config.depth, self.places)
        self.copy = BlockCopy(trunk.build(trunk.channels + channels, depth))
        self.patch = int(trunk.network.config.patch_size)  # type: ignore[union-attr]

    def forward(self, seen: Seen) -> Residuals:
        shown = torch.cat([seen.inputs, seen.maps], 1)
        residuals = self.copy(lambda network: seen.call(network, shown))
        keep = None
        if self.config.outside_only:
            assert seen.hidden is not None
            keep = untouched_patches(seen.hidden, self.patch)
        return placed(residuals, self.places, placement=self.config.placement, keep=keep, scale=self.config.scale)

    def start_from(self, trunk: Trunk) -> None:
        take_weights(self.copy.network, trunk.network, trunk.channels)

    def networks(self) -> list[nn.Module]:
        return [self.copy.network]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "patch_size": 4}
        branches = {"one": {"type": "context", "depth": 2}}
        return {"network": "dit", "settings": settings, "conditions": ["channels", "source"], "branches": branches}
