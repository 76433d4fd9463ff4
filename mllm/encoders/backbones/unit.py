"""What does UNIT see, one ViT for pictures and pages of text, with positions cut out of one table (arXiv 2409.04095)?"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import Block, drop_rates, init_linear, run, token_table
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.errors import ConfigError
from mllm.types import Grid, ImageSpec

CLIP: dict[str, Any] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_EPS = 1e-6


class UnitConfig(BackboneConfig):
    """UNIT; defaults are the 600M model (ViT-H/14). Feed its tokens through a LayerNorm (``connector: {type: mlp,
    norm_before: layer_norm}``), as the authors advise."""

    width: int = Field(default=1280, gt=0)
    depth: int = Field(default=32, gt=0)
    num_heads: int = Field(default=16, gt=0)
    patch_size: int = Field(default=14, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    cpe_max_size: int = Field(default=1024, gt=0)
    """Pixels whose patches the square table of positions holds, rounded to whole patches."""
    num_cls_tokens: int = Field(default=1, ge=1)
    register_multiple: int = Field(default=0, ge=0)
    """Registers fill class tokens up to a multiple of this; 0: none."""
    position_jitter: bool = False
    """In training show every image a random window of the table, and a tenth of them no position, as the authors'
    pretraining does."""

    @property
    def side(self) -> int:
        """Rows and columns of the table."""
        return round(self.cpe_max_size / self.patch_size)

    @property
    def num_special(self) -> int:
        """Class tokens and registers."""
        more = self.register_multiple - self.num_cls_tokens % self.register_multiple if self.register_multiple else 0
        return self.num_cls_tokens + more


class ClassTokens(nn.Module):
    """Class tokens and registers, which have no position."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.token = token_table(count, width)


class PatchGenerator(nn.Module):
    """Pixels ``(B, 3, H, W)`` → class tokens, registers and positioned patches ``(B, S + N, D)``."""

    def __init__(self, config: UnitConfig):
        super().__init__()
        self.patch_size, self.side, self.jitters = config.patch_size, config.side, config.position_jitter
        self.pos_embed = token_table(1, config.side**2, config.width)
        self.embedder = nn.Linear(3 * config.patch_size**2, config.width, bias=False)
        self.cls_token = ClassTokens(config.num_special, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        cells = pixels.unflatten(3, (grid[1], size)).unflatten(2, (grid[0], size))  # B, 3, rows, p, columns, p
        x = self.embedder(cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        positions = self.positions(grid)
        if self.training and self.jitters:
            positions = self.random_windows(grid, len(pixels))
        x = x + positions.to(x.dtype)
        return torch.cat([self.cls_token.token.expand(len(x), -1, -1), x], dim=1)

    def _map(self) -> Tensor:
        return self.pos_embed.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)

    def positions(self, grid: Grid) -> Tensor:
        """``(1, N, D)``: the table at the size of the longer side, of which the top left is used."""
        if grid == (self.side, self.side):
            return self.pos_embed
        longer = max(grid)
        table = F.interpolate(self._map().float(), size=(longer, longer), mode="bilinear", align_corners=True)
        return table[:, :, : grid[0], : grid[1]].flatten(2).transpose(1, 2)

    def random_windows(self, grid: Grid, batch: int) -> Tensor:
        """``(B, N, D)``: for each image another window of the table, none at all for one in ten."""
        device = self.pos_embed.device
        least, ratio = math.sqrt(0.1), math.log(4 / 3)
        scale = torch.rand(batch, 1, 1, device=device) * (1 - least) + least
        aspect = torch.exp((torch.rand(batch, 1, 1, device=device) * 2 - 1) * ratio)
        extent = torch.stack([scale * aspect, scale / aspect], dim=-1).clamp(0, 1)
        corner = torch.rand(batch, 1, 1, 2, device=device) * (1 - extent)
        rows, columns = (torch.linspace(0, 1, count, device=device) for count in grid)
        places = torch.stack([columns.expand(grid[0], -1), rows[:, None].expand(-1, grid[1])], dim=-1)
        table = self._map().float().expand(batch, -1, -1, -1)
        found = F.grid_sample(table, (places * extent + corner) * 2 - 1, mode="bilinear", align_corners=True)
        kept = torch.rand(batch, 1, 1, device=device) > 0.1
        return found.flatten(2).transpose(1, 2) * kept


class Unit(nn.Module):
    """The ViT under the authors' names."""

    recompute = False

    def __init__(self, config: UnitConfig, depth: int, last_norm: bool):
        super().__init__()
        self.patch_generator = PatchGenerator(config)
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio, eps=_EPS, drop_path=rates[i]) for i in range(depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=_EPS) if last_norm else None
        self.apply(init_linear)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Tokens ``(B, S + N, D)`` before the first block and after each one, the last ones normed where there is a
        norm."""
        outputs = [self.patch_generator(pixels)]
        for block in self.blocks:
            outputs.append(run(block, outputs[-1], recompute=self.recompute))
        if self.norm is not None:
            outputs[-1] = self.norm(outputs[-1])
        return outputs


class UnitEncoder(BackboneEncoder):
    """UNIT's patch tokens at any size that whole patches fill. Prefix: class tokens and registers."""

    Config: ClassVar[type[EncoderConfig]] = UnitConfig
    config: UnitConfig
    model: Unit

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "cpe_max_size": 30, "register_multiple": 4}
        return {"type": "unit", **sizes, "image_size": [16, 20], "keep_prefix": True}

    @classmethod
    def default_image(cls, config: UnitConfig) -> ImageSpec:
        side = config.patch_size * (448 // config.patch_size)
        return ImageSpec(height=side, width=side, patch=config.patch_size, **CLIP)

    @classmethod
    def build(cls, config: UnitConfig) -> Unit:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "one patch")
        depth = max(take_layers(config.layers, config.depth))
        return Unit(config, depth, config.final_norm and depth == config.depth)

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: UnitConfig) -> dict[str, Tensor]:
        """Mean and deviation, which checkpoints hold, are the image's (`ImageSpec`) here; a table of another size is
        resized as the authors do."""
        state = {key: value for key, value in state.items() if "input_conditioner." not in key}
        for key, value in state.items():
            side = math.isqrt(value.shape[1]) if key.endswith("patch_generator.pos_embed") and value.ndim == 3 else 0
            if side not in (0, config.side) and side**2 == value.shape[1]:
                table = value.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
                table = F.interpolate(table, size=(config.side, config.side), mode="bicubic", align_corners=True)
                state[key] = table.flatten(2).transpose(1, 2).to(value.dtype)
        return state

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs, special = self.model(pixels), self.config.num_special
        grid = (pixels.shape[2] // self.config.patch_size, pixels.shape[3] // self.config.patch_size)
        counts = take_layers(self.config.layers, self.config.depth)
        return [LayerOutput(outputs[k][:, special:], grid, outputs[k][:, :special]) for k in counts]
