"""What geometry do several views of one scene show? The aggregator of VGGT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, group_parameters, resample_tokens, take_layers
from mllm.encoders.multiview import ViewsConfig, ViewsEncoder
from mllm.encoders.view_blocks import Block, DinoV2, PatchConv, ViewsModel, across_views, rotary_table, token_places
from mllm.encoders.weights import load_exactly
from mllm.errors import AlignmentError, CheckpointError, ConfigError
from mllm.types import Grid, ImageSpec, VisionFeatures


class VggtConfig(ViewsConfig):
    """VGGT (arXiv 2503.11651); defaults are VGGT-1B's aggregator."""

    width: int = Field(default=1024, gt=0)
    """C. One layer's features have 2 C channels: after the frame block, then after the global block."""
    depth: int = Field(default=24, gt=0)
    num_heads: int = Field(default=16, gt=0)
    num_registers: int = Field(default=4, ge=0)
    """Register tokens of the aggregator and of its DINOv2, which has as many (as upstream)."""
    patch_embed: Literal["dinov2", "conv"] = "dinov2"
    dinov2_depth: int = Field(default=24, gt=0)
    dinov2_image_size: int = Field(default=518, gt=0)
    """Image size of DINOv2's position table, which is resized on use (bicubic, antialiased)."""


class FeatureEmbed(nn.Module):
    """Another encoder's features ``(B, N, D)`` → patches ``(B, N, C)``."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.proj = nn.Linear(width_in, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(self.norm(tokens))


class Aggregator(ViewsModel):
    """Frame attention inside each view, then global attention over the views of a scene, in turns.

    The first view of a scene is its reference: it has camera and register tokens of its own.
    """

    def __init__(self, config: VggtConfig, depth: int):
        super().__init__()
        width = config.width
        self.num_special, self.patch_size = 1 + config.num_registers, config.patch_size
        self.head_dim = width // config.num_heads
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, width) * 1e-6)
        self.register_token = nn.Parameter(torch.randn(1, 2, config.num_registers, width) * 1e-6)
        self.patch_embed: nn.Module
        if config.reads is not None:
            assert config.reads.width is not None
            self.patch_embed = FeatureEmbed(config.reads.width, width)
        else:
            self.patch_embed = dinov2(config) if config.patch_embed == "dinov2" else PatchConv(width, config.patch_size)
        self.frame_blocks = nn.ModuleList(_block(config) for _ in range(depth))
        self.global_blocks = nn.ModuleList(_block(config) for _ in range(depth))

    def forward(
        self, pixels: Tensor, views: Sequence[int], wanted: Sequence[int], grid: Grid | None = None
    ) -> dict[int, Tensor]:
        """pixels ``(B, 3, H, W)``, ImageNet-normalised, the views of a scene side by side (another encoder's features ``(B, N, D)`` on
        ``grid`` where those are read); views: how many each scene has, in order; wanted: layer counts → ``{count: (B, 1 + R + N,
        2 C)}``."""
        if isinstance(self.patch_embed, DinoV2):
            patches = self.patch_embed(pixels, self.run)[:, self.num_special :]  # after class token and registers
        else:
            patches = self.patch_embed(pixels)
        later = torch.tensor([0 if view == 0 else 1 for count in views for view in range(count)], device=pixels.device)
        special = torch.cat([self.camera_token[0][later], self.register_token[0][later]], dim=1)
        x = torch.cat([special, patches], dim=1)
        grid = grid or (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        rotation = rotary_table(token_places(grid, self.num_special, x.device), self.head_dim, x.dtype)
        outputs: dict[int, Tensor] = {}
        for count, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks), start=1):
            in_frame = self.run(frame_block, x, rotation)
            x = across_views(self.run, global_block, in_frame, views, rotation)
            if count in wanted:
                outputs[count] = torch.cat([in_frame, x], dim=-1)
        return outputs


def dinov2(config: VggtConfig) -> DinoV2:
    """What takes the patches of VGGT's pictures."""
    return DinoV2(
        config.width,
        config.num_heads,
        depth=config.dinov2_depth,
        patch_size=config.patch_size,
        image_size=config.dinov2_image_size,
        num_registers=config.num_registers,
    )


def _block(config: VggtConfig) -> Block:
    return Block(config.width, config.num_heads, qk_norm=True, scale=0.01, eps=1e-5)


class VggtEncoder(ViewsEncoder):
    """VGGT's features of the views of a scene. Their order counts: the first one is the reference view. Prefix: camera and register
    tokens."""

    Config: ClassVar[type[EncoderConfig]] = VggtConfig
    config: VggtConfig
    reads_features: ClassVar[bool] = True
    model: Aggregator

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "dinov2_depth": 1, "dinov2_image_size": 16}
        return {"type": "vggt", **sizes, "image_size": [16, 20], "keep_prefix": True}

    @classmethod
    def default_image(cls, config: VggtConfig) -> ImageSpec:
        return ImageSpec(height=518, width=518, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    @classmethod
    def build(cls, config: VggtConfig) -> Aggregator:
        cls.check_sizes(config, config.width, config.num_heads)
        if config.reads is not None and (config.reads.width is None or config.reads.grid is None):
            raise ConfigError(
                f"reads: {config.reads.encoder!r} is an encoder of a model, and this one stands alone; give it in a model's encoders"
            )
        return Aggregator(config, depth=max(take_layers(config.layers, config.depth, lowest=1)))

    def seen(self, pixels: Tensor, given: VisionFeatures | None) -> Tensor:
        """What the aggregator is given of views: pixels, or the features ``(B, N, D)`` that it reads, on its own grid."""
        reads = self.config.reads
        if reads is None:
            return pixels
        assert reads.width is not None and reads.grid is not None
        if given is None:
            if not pixels.is_meta:  # sizes alone are asked for on meta
                raise ConfigError(
                    f"encoder {self.config.type} reads the features of {reads.encoder!r} and was given none; it runs inside a model that "
                    "has both"
                )
            given = VisionFeatures(
                pixels.new_zeros(len(pixels), reads.grid[0] * reads.grid[1], reads.width), reads.grid
            )
        if len(given.tokens) != len(pixels):
            raise AlignmentError(f"encoder {self.config.type}: features of {len(given.tokens)} views for {len(pixels)}")
        tokens = given.tokens.to(pixels)
        return tokens if given.grid == self.own_grid else resample_tokens(tokens, given.grid, self.own_grid)

    def read_views(self, pixels: Tensor, views: list[int]) -> list[LayerOutput]:
        counts = take_layers(self.config.layers, self.config.depth, lowest=1)
        grid = self.own_grid
        outputs = self.model(pixels, views, counts, grid)
        start = self.model.num_special
        return [LayerOutput(outputs[count][:, start:], grid, outputs[count][:, :start]) for count in counts]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        names = [name for name, _ in self.named_parameters()]
        numbers = range(len(self.model.frame_blocks))
        outside = [n for n in names if not n.startswith(("model.frame_blocks.", "model.global_blocks."))]
        layers = [(f"layers.{i}", [f"model.frame_blocks.{i}.", f"model.global_blocks.{i}."]) for i in numbers]
        return [*group_parameters(outside, []), *layers]

    def load_pretrained(self) -> None:
        """From a checkpoint of the whole VGGT (``aggregator.…``) or of its aggregator."""
        source, state = self.published(set(self.model.state_dict()))
        for key in [k for k in state if k.endswith("mask_token")]:
            del state[key]
        if self.config.reads is not None:  # what took patches in the published model gives way to what takes features
            own = {f"patch_embed.{k}": v for k, v in self.model.patch_embed.state_dict().items()}
            if not own.keys() <= state.keys():
                state = {k: v for k, v in state.items() if not k.startswith("patch_embed.")} | own
        with torch.device("meta"):
            full = Aggregator(self.config, depth=self.config.depth)
        deeper = len([k for k in state if k.startswith(f"frame_blocks.{self.config.depth}.")])
        if deeper:
            raise CheckpointError(f"weights: {source} is deeper than depth: {self.config.depth}")
        load_exactly(self.model, state, source=source, known=set(full.state_dict()), heads=())
