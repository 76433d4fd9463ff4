"""Where in space does each patch of a frame lie? An encoder of depth maps and camera poses, beside one that sees the picture."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.base import EncoderConfig, VisionEncoder, grid_without_blocks
from mllm.encoders.library import ImageEncoderConfig, check_pixels
from mllm.errors import CheckpointError, UnavailableError
from mllm.types import EncoderInfo, ImageSpec, VisionFeatures


class PointsConfig(ImageEncoderConfig):
    """Reads what a row or a `Video` tells of the scene: poses and depths, or a file of points. Three channels, x, y, z in metres as the
    first frame that is seen has them (x right, y down, z forward); NaN where nothing is known."""

    image_size: int | tuple[int, int] | None = 224
    patch_size: int = Field(default=14, gt=0)
    width: int = Field(default=256, gt=0)
    """D of its features."""
    frequencies: int = Field(default=8, ge=1)
    """Waves by which a place is told along each axis: 1/8 radian a metre, and each twice the one before."""
    missing: Literal["refuse", "unknown"] = "refuse"
    """A picture or video whose points nothing tells. unknown: all its patches lie nowhere, which the encoder learns."""


class PointsEncoder(VisionEncoder):
    """Points ``(B, 3, H, W)`` → a token for each patch from the mean and the spread of its known points and their share. No attention: it
    is to stand beside an encoder of the picture (connector channel_concat)."""

    Config: ClassVar[type[EncoderConfig]] = PointsConfig
    config: PointsConfig

    def __init__(self, config: PointsConfig):
        super().__init__(config if config.info is not None else self.resolve(config))
        config = self.config
        inputs = 3 * (2 * config.frequencies + 1) + 3 + 1
        self.tell = nn.Sequential(nn.Linear(inputs, config.width), nn.GELU(), nn.Linear(config.width, config.width))
        self.nowhere = nn.Parameter(torch.zeros(config.width))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"type": "points", "patch_size": 4, "image_size": [8, 12], "width": 16}

    @classmethod
    def resolve(cls, config: PointsConfig) -> Any:
        image, size = config.image(ImageSpec(height=224, width=224)), config.patch_size
        grid = grid_without_blocks(config, image, size)
        image = image.model_copy(update={"points": config.missing})
        info = EncoderInfo(image=image, grid=grid, width=config.width)
        return config.model_copy(update={"info": info})

    def load_pretrained(self) -> None:
        raise CheckpointError("points has no published weights; remove weights from its config")

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        return [("embeddings", [name for name, _ in self.named_parameters()])]

    def forward(
        self, pixels: Tensor, *, scene_ids: Tensor | None = None, return_attention: bool = False
    ) -> VisionFeatures:
        if return_attention:
            raise UnavailableError("return_attention: points has no attention")
        info, size = self.config.resolved_info, self.config.patch_size
        check_pixels(pixels, info.image, self.config.type)
        rows, cols = info.grid
        patches = pixels.float().reshape(len(pixels), 3, rows, size, cols, size).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)
        known = patches.isfinite().all(dim=-1, keepdim=True)
        filled = torch.where(known, patches, 0.0)
        count = known.sum(dim=3).clamp(min=1)
        place = filled.sum(dim=3) / count
        spread = (torch.where(known, filled - place.unsqueeze(3), 0.0).square().sum(dim=3) / count).sqrt()
        waves = place.unsqueeze(-1) * 2.0 ** torch.arange(-3, self.config.frequencies - 3, device=pixels.device)
        told = [place, waves.sin().flatten(-2), waves.cos().flatten(-2), spread, known.float().mean(dim=3)]
        tokens = self.tell(torch.cat(told, dim=-1).to(self.nowhere.dtype))
        tokens = torch.where(known.any(dim=3), tokens, self.nowhere)
        return VisionFeatures(tokens.flatten(1, 2), info.grid)
