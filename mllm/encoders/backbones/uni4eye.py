"""What does one ViT see of pictures and of volumes of slices, by patches in two and in three dimensions (Uni4Eye, MICCAI 2022)?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import Block, drop_rates, init_linear, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, merge_layers, take_layers, tiles_alone
from mllm.encoders.weights import resize_positions
from mllm.errors import ConfigError
from mllm.types import Grid, VisionFeatures


class Uni4EyeConfig(BackboneConfig):
    """Uni4Eye's encoder after the papers; defaults are ViT-B/16. The authors' first code is not public and the second one's cannot
    be run, so no claim to their numbers is made. Its training (reconstruct the picture and its gradient map) is the stage kind
    ``masked`` with target ``pixels_gradients``."""

    width: int = Field(default=768, gt=0, multiple_of=4)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch_size: int = Field(default=16, gt=0)
    patch_depth: int = Field(default=4, gt=0)
    """Slices of a volume that one patch holds."""
    trained_size: int = Field(default=224, gt=0)
    """Image size of the two position tables, which are resized for another."""
    trained_slices: int = Field(default=32, gt=0)
    """Slices that the positions along a volume were made for; those of another number are interpolated."""


class UnifiedPatchEmbed(nn.Module):
    """Pictures ``(B, 3, H, W)`` or volumes ``(B, 3, slices, H, W)`` → tokens ``(B, N, D)`` with their positions, by the input's
    number of axes: two projections, two tables. Volumes lie group of slices by group, then row by row."""

    def __init__(self, config: Uni4EyeConfig):
        super().__init__()
        size, depth = config.patch_size, config.patch_depth
        self.patch_depth, self.side = depth, config.trained_size // size
        self.proj = nn.Conv2d(3, config.width, size, stride=size)
        self.proj_3d = nn.Conv3d(3, config.width, (depth, size, size), stride=(depth, size, size))
        # Of pictures sines and cosines, of volumes learned from zero.
        self.pos_embed = nn.Parameter(_sines((self.side, self.side), config.width)[None])
        self.pos_embed_3d = nn.Parameter(torch.zeros(1, self.side**2, config.width))
        self.depth_embed_3d = nn.Parameter(torch.zeros(1, max(config.trained_slices // depth, 1), config.width))

    def _places(self, table: Tensor, grid: Grid) -> Tensor:
        trained = (self.side, self.side)
        return table if grid == trained else resize_positions(table, trained, grid)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            x = self.proj(x)
            return x.flatten(2).transpose(1, 2) + self._places(self.pos_embed, (x.shape[2], x.shape[3]))
        short = -x.shape[2] % self.patch_depth
        if short:  # the last slice again
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1, -1)], dim=2)
        x = self.proj_3d(x)
        groups, *grid = x.shape[2:]
        along = self.depth_embed_3d
        if groups != along.shape[1]:
            along = F.interpolate(along.float().transpose(1, 2), size=groups, mode="linear").transpose(1, 2).to(x.dtype)
        places = self._places(self.pos_embed_3d, (grid[0], grid[1]))
        return x.flatten(2).transpose(1, 2) + (along[:, :, None] + places[:, None]).flatten(1, 2)


def _sines(grid: Grid, width: int) -> Tensor:
    """``(rows · columns, D)``: MAE's table, sines and cosines of the column in the first half of the width, of the row in the second."""
    speed = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * speed for n in grid)
    row, column = rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1).flatten(0, 1).float()


class Uni4EyeVit(nn.Module):
    """Pictures or volumes to tokens: class token, then patches. Everything behind the patch embedding serves both."""

    recompute = False

    def __init__(self, config: Uni4EyeConfig, depth: int, last_norm: bool):
        super().__init__()
        self.patch_embed = UnifiedPatchEmbed(config)
        self.cls_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, config.width), std=0.02))
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio, drop_path=rates[i]) for i in range(depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6) if last_norm else None
        self.apply(init_linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, 1 + N, D)`` before the first block and after each, the last one normed where there is a norm."""
        patches = self.patch_embed(x)
        outputs = [torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)]
        for block in self.blocks:
            outputs.append(run(block, outputs[-1], recompute=self.recompute))
        if self.norm is not None:
            outputs[-1] = self.norm(outputs[-1])
        return outputs


class Uni4EyeEncoder(BackboneEncoder):
    """Images that are alone in their scene are pictures; several of one ``scene_ids`` are, in their order, the slices of a volume and
    see each other. A slice's tokens are those of its group of ``patch_depth`` slices. Prefix: the class token."""

    Config: ClassVar[type[EncoderConfig]] = Uni4EyeConfig
    config: Uni4EyeConfig
    joins_views: ClassVar[bool] = True
    model: Uni4EyeVit

    @property
    def volume_depth(self) -> int:
        return self.config.patch_depth

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "patch_depth": 2, "mlp_ratio": 2.0}
        trained = {"trained_size": 16, "trained_slices": 6}
        return {"type": "uni4eye", **sizes, **trained, "image_size": [16, 20], "keep_prefix": True}

    @classmethod
    def build(cls, config: Uni4EyeConfig) -> Uni4EyeVit:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if config.trained_size % config.patch_size:
            raise ConfigError(f"trained_size: {config.trained_size} is no multiple of patch_size {config.patch_size}")
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "patch_size")
        depth = max(take_layers(config.layers, config.depth))
        return Uni4EyeVit(config, depth, config.final_norm and depth == config.depth)

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: Uni4EyeConfig) -> dict[str, Tensor]:
        """A masked autoencoder's position table has its place beside the projection here, without the class token's zeros."""
        renamed = {}
        for key, value in state.items():
            if key.rpartition(".")[2] == "pos_embed" and "patch_embed" not in key and value.ndim == 3:
                head = key.removesuffix("pos_embed")
                key = f"{head}patch_embed.pos_embed"
                square = round((value.shape[1] - 1) ** 0.5) ** 2
                if square == value.shape[1] - 1:
                    first = f"{head}cls_token"
                    state = {**state, first: state[first] + value[:, :1]} if first in state else state
                    value = value[:, 1:]
            renamed[key] = value
        return renamed | {key: state[key] for key in renamed if key.endswith("cls_token") and key in state}

    @classmethod
    def absent(cls, state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of pictures alone open too: a volume's projection is then the picture's, spread over the slices."""
        missing = [key for key in own if "_3d" in key and key not in state]
        if not missing or any("_3d" in key for key in state) or "patch_embed.proj.weight" not in state:
            return {}
        filled = {key: torch.zeros_like(own[key], device="cpu") for key in missing}
        weight = state["patch_embed.proj.weight"]
        depth = own["patch_embed.proj_3d.weight"].shape[2]
        filled["patch_embed.proj_3d.weight"] = weight[:, :, None].expand(-1, -1, depth, -1, -1) / depth
        filled["patch_embed.proj_3d.bias"] = state["patch_embed.proj.bias"].clone()
        filled["patch_embed.pos_embed_3d"] = state["patch_embed.pos_embed"].clone()
        return filled

    @classmethod
    def published_names(cls, config: Uni4EyeConfig) -> set[str]:
        return super().published_names(config) | {"mask_token", "decoder_pos_embed"}

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        places: Tensor | None = None,
        return_attention: bool = False,
    ) -> VisionFeatures:
        """places ``(B, 2)``: a tile (not (-1, -1)) shows a part of a picture, so it is a picture of its own."""
        pixels = self.without_attention(pixels, return_attention)
        if len(pixels) == 0:
            return self.empty_features(pixels)
        if scene_ids is None:
            return merge_layers(self.read_layers(pixels), self.config.keep_prefix)
        scene_ids = tiles_alone(scene_ids, places)
        order = scene_ids.argsort(stable=True)
        counts = torch.unique_consecutive(scene_ids[order], return_counts=True)[1].tolist()
        return self._read_scenes(pixels, list(order.split(counts)))

    def _read_scenes(self, pixels: Tensor, scenes: list[Tensor]) -> VisionFeatures:
        """Scenes with as many slices run as one batch."""
        info, count = self.config.resolved_info, len(pixels)
        tokens = pixels.new_zeros(count, info.num_tokens, info.width)
        prefix = pixels.new_zeros(count, 1, info.width)
        for slices in sorted({len(scene) for scene in scenes}):
            members = torch.stack([scene for scene in scenes if len(scene) == slices])  # (S, slices)
            volumes = pixels[members]
            x = volumes[:, 0] if slices == 1 else volumes.transpose(1, 2)
            found = merge_layers(self._outputs(x, slices), True)
            assert found.prefix is not None
            places = members.flatten()
            tokens = tokens.index_copy(0, places, found.tokens.to(tokens.dtype))
            prefix = prefix.index_copy(0, places, found.prefix.to(prefix.dtype))
        return VisionFeatures(tokens, info.grid, prefix if self.config.keep_prefix else None)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        return self._outputs(pixels, 1)

    def _outputs(self, x: Tensor, slices: int) -> list[LayerOutput]:
        """Of every image: a volume's groups are handed to each of their slices."""
        self.model.recompute = self.recompute
        outputs, size = self.model(x), self.config.patch_size
        grid = (x.shape[-2] // size, x.shape[-1] // size)
        found = []
        for count in take_layers(self.config.layers, self.config.depth):
            patches, prefix = outputs[count][:, 1:], outputs[count][:, :1]
            if x.ndim == 5:
                groups = patches.unflatten(1, (-1, grid[0] * grid[1]))
                patches = groups.repeat_interleave(self.config.patch_depth, dim=1)[:, :slices].flatten(0, 1)
                prefix = prefix.repeat_interleave(slices, dim=0)
            found.append(LayerOutput(patches, grid, prefix))
        return found

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        blocks = [(f"layers.{i}", [f"model.blocks.{i}."]) for i in range(len(self.model.blocks))]
        norm = [("norm", ["model.norm."])] if self.model.norm is not None else []
        return [("embeddings", ["model.patch_embed.", "model.cls_token"]), *blocks, *norm]
