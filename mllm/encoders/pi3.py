"""What geometry do several views of one scene show, none of them before the others? Encoder and decoder of π³ (its heads: `pi3_heads`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, group_parameters, take_layers
from mllm.encoders.multiview import ViewsConfig, ViewsEncoder
from mllm.encoders.view_blocks import Block, DinoV2, ViewsModel, across_views, rotary_table, token_places
from mllm.encoders.weights import load_exactly
from mllm.errors import CheckpointError
from mllm.types import ImageSpec

_HEADS = ("point_decoder.", "conf_decoder.", "camera_decoder.", "point_head.", "conf_head.", "camera_head.", "image_")
"""Of the published model, what comes after the decoder, and its constants of normalisation."""
_GIVEN = (
    "depth_encoder.",
    "depth_emb",
    "ray_embed.",
    "pose_inject_blk.",
    "metric_token",
    "metric_decoder.",
    "metric_head.",
)
"""Of π³-X, what reads known depth, lenses and cameras, none of which is given here, and what tells its scale."""


class Pi3Config(ViewsConfig):
    """π³ (arXiv 2507.13347); defaults are the published model's, and π³-X's, which is the same where pictures alone are given."""

    width: int = Field(default=1024, gt=0)
    """C. One layer's features have 2 C channels: after its block inside each view, then after its block across the views."""
    depth: int = Field(default=18, gt=0)
    """Pairs of blocks."""
    num_heads: int = Field(default=16, gt=0)
    num_registers: int = Field(default=5, ge=0)
    """Register tokens of the decoder."""
    dinov2_depth: int = Field(default=24, gt=0)
    dinov2_registers: int = Field(default=4, ge=0)
    dinov2_image_size: int = Field(default=518, gt=0)
    """Image size of DINOv2's position table, which is resized on use (bicubic, antialiased)."""


class Pi3Model(ViewsModel):
    """DINOv2 of each view, then attention inside each view and across the views of a scene, in turns. All views are alike: turned round,
    the views of a scene give the same features turned round."""

    def __init__(self, config: Pi3Config, depth: int):
        super().__init__()
        width, heads = config.width, config.num_heads
        self.num_special, self.patch_size, self.head_dim = config.num_registers, config.patch_size, width // heads
        self.register_token = nn.Parameter(torch.randn(1, 1, config.num_registers, width) * 1e-6)
        self.encoder = DinoV2(
            width,
            heads,
            depth=config.dinov2_depth,
            patch_size=config.patch_size,
            image_size=config.dinov2_image_size,
            num_registers=config.dinov2_registers,
        )
        self.first = 1 + config.dinov2_registers
        self.decoder = nn.ModuleList(Block(width, heads, qk_norm=True, scale=0.01, eps=1e-6) for _ in range(2 * depth))

    def forward(self, pixels: Tensor, views: Sequence[int], wanted: Sequence[int]) -> dict[int, Tensor]:
        """pixels ``(B, 3, H, W)``, ImageNet-normalised, the views of a scene side by side; views: how many each scene has, in order;
        wanted: counts of pairs → ``{count: (B, R + N, 2 C)}``."""
        patches = self.encoder(pixels, self.run)[:, self.first :]
        x = torch.cat([self.register_token[0].expand(len(pixels), -1, -1), patches], dim=1)
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        rotation = rotary_table(token_places(grid, self.num_special, x.device), self.head_dim, x.dtype)
        outputs: dict[int, Tensor] = {}
        for number in range(0, len(self.decoder), 2):
            inside = self.run(self.decoder[number], x, rotation)
            x = across_views(self.run, self.decoder[number + 1], inside, views, rotation)
            if number // 2 + 1 in wanted:
                outputs[number // 2 + 1] = torch.cat([inside, x], dim=-1)
        return outputs


class Pi3Encoder(ViewsEncoder):
    """π³'s features of the views of a scene, whose order says nothing (but with ``chunk``, where all see the first). Prefix: register
    tokens."""

    Config: ClassVar[type[EncoderConfig]] = Pi3Config
    config: Pi3Config
    model: Pi3Model

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "dinov2_depth": 1, "dinov2_image_size": 16}
        return {"type": "pi3", **sizes, "image_size": [16, 20], "keep_prefix": True}

    @classmethod
    def default_image(cls, config: Pi3Config) -> ImageSpec:
        return ImageSpec(height=518, width=518, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    @classmethod
    def build(cls, config: Pi3Config) -> Pi3Model:
        cls.check_sizes(config, config.width, config.num_heads)
        return Pi3Model(config, depth=max(take_layers(config.layers, config.depth, lowest=1)))

    def read_views(self, pixels: Tensor, views: list[int]) -> list[LayerOutput]:
        counts, start = take_layers(self.config.layers, self.config.depth, lowest=1), self.model.num_special
        outputs = self.model(pixels, views, counts)
        return [LayerOutput(outputs[count][:, start:], self.own_grid, outputs[count][:, :start]) for count in counts]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        pairs = [
            [f"model.decoder.{2 * i}.", f"model.decoder.{2 * i + 1}."] for i in range(len(self.model.decoder) // 2)
        ]
        outside = [name for name, _ in self.named_parameters() if not name.startswith("model.decoder.")]
        return [*group_parameters(outside, []), *((f"layers.{i}", pair) for i, pair in enumerate(pairs))]

    def load_pretrained(self) -> None:
        """From a checkpoint of the whole model, or of its encoder and decoder."""
        source, state = self.published(set(self.model.state_dict()))
        state = {key: value for key, value in state.items() if not key.startswith((*_HEADS, *_GIVEN))}
        if any(key.startswith(f"decoder.{2 * self.config.depth}.") for key in state):
            raise CheckpointError(f"weights: {source} is deeper than depth: {self.config.depth}")
        with torch.device("meta"):
            full = Pi3Model(self.config, depth=self.config.depth)
        load_exactly(self.model, state, source=source, known={*full.state_dict(), "encoder.mask_token"}, heads=())
