"""What does ChannelViT see: each channel of an image as patches of its own (arXiv 2309.16108)?"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneEncoder, PanelConfig, planes_of, require_multiple
from mllm.encoders.backbones.layers import Block, drop_rates, init_linear, run, token_table
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, merge_layers, take_layers
from mllm.errors import ConfigError, UnavailableError
from mllm.types import VisionFeatures


class ChannelVitConfig(PanelConfig):
    """ChannelViT; defaults are ChannelViT-S/16."""

    width: int = Field(default=384, gt=0)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=6, gt=0)
    patch_size: int = Field(default=16, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    num_channels: int = Field(default=3, gt=0)
    """Rows of the channel table: all channels that the weights know."""
    channels: list[int] | None = Field(default=None, min_length=1)
    """Ids of the channels that pixels bring, in order, unless a call names others. Default: 0, 1, 2 … as many as ``panels`` hold."""
    trained_size: int = Field(default=224, gt=0)
    """Image size of the position table, which is resized as the authors resize it."""
    merge: Literal["stack", "concat", "mean"] = "stack"
    """Tokens of c channels: under one another, as the authors' (grid c rows × cols), side by side in the width, or
    averaged; the last two lie on the grid of other encoders."""
    sample_channels: bool = False
    """Hierarchical channel sampling while the encoder learns: a random number of random channels of each batch."""

    @property
    def default_channels(self) -> list[int]:
        return list(range(min(self.num_channels, 3 * self.panels))) if self.channels is None else self.channels


class ChannelPatches(nn.Module):
    """``(B, c, H, W)`` → ``(B, D, c, rows, cols)``: one projection for all channels, and a row of a table for each."""

    def __init__(self, config: ChannelVitConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv3d(1, config.width, (1, size, size), stride=(1, size, size))
        self.channel_embed = nn.Embedding(config.num_channels, config.width)
        nn.init.trunc_normal_(self.channel_embed.weight, std=0.02)

    def forward(self, pixels: Tensor, channels: Tensor) -> Tensor:
        return self.proj(pixels[:, None]) + self.channel_embed(channels).transpose(1, 2)[..., None, None]


class ChannelVit(nn.Module):
    """Pixels of any channels to tokens, under the authors' names."""

    recompute = False

    def __init__(self, config: ChannelVitConfig, depth: int, last_norm: bool):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.trained_size // config.patch_size
        self.cls_token = token_table(1, 1, config.width)
        self.pos_embed = token_table(1, 1 + self.side**2, config.width)
        self.patch_embed = ChannelPatches(config)
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio, drop_path=rates[i]) for i in range(depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6) if last_norm else None
        self.apply(init_linear)

    def positions(self, num_channels: int, rows: int, cols: int) -> Tensor:
        """``(1, 1 + c rows cols, D)``, the same for every channel.

        The authors take the table as it is for one channel at the trained size only; otherwise they resample it, a
        little even at the trained size, by factors a tenth of a row and a column too large.
        """
        table, side = self.pos_embed, self.side
        if num_channels == 1 and rows == cols == side:
            return table
        image = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        factors = ((rows + 0.1) / side, (cols + 0.1) / side)
        image = F.interpolate(image, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        patches = image[..., :rows, :cols].flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat([table[:, :1], patches.repeat(1, num_channels, 1)], dim=1)

    def embed(self, pixels: Tensor, channels: Tensor) -> Tensor:
        """``(B, c, H, W)`` and channel ids ``(B, c)`` → ``(B, 1 + c rows cols, D)``: class token, then channel by
        channel, row by row."""
        patches = self.patch_embed(pixels, channels)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return x + self.positions(*patches.shape[2:])

    def forward(self, pixels: Tensor, channels: Tensor) -> list[Tensor]:
        """Embeddings and every block's output, the last one normed where there is a norm."""
        outputs = [self.embed(pixels, channels)]
        for block in self.blocks:
            outputs.append(run(block, outputs[-1], recompute=self.recompute))
        if self.norm is not None:
            outputs[-1] = self.norm(outputs[-1])
        return outputs


class ChannelVitEncoder(BackboneEncoder):
    """Any number of channels: a call may name the ids of those its pixels bring (RGB and depth, microscopy). Prefix:
    the class token."""

    Config: ClassVar[type[EncoderConfig]] = ChannelVitConfig
    config: ChannelVitConfig
    model: ChannelVit

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "trained_size": 16, "num_channels": 5}
        return {
            "type": "channelvit",
            **sizes,
            "image_size": [16, 20],
            "channels": [4, 0, 2],
            "merge": "concat",
            "layers": [-2, -1],
        }

    @classmethod
    def build(cls, config: ChannelVitConfig) -> ChannelVit:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if config.trained_size % config.patch_size:
            raise ConfigError(f"trained_size: {config.trained_size} is no multiple of patch_size {config.patch_size}")
        _check_ids(config.default_channels, config.num_channels, "channels")
        if config.sample_channels and config.merge != "mean":
            raise ConfigError(
                f"sample_channels: with merge {config.merge} the number of features would change from batch to batch; "
                "set merge: mean"
            )
        if config.keep_prefix and config.merge == "concat":
            raise ConfigError("keep_prefix: there is one class token for all channels; it has no place beside concat")
        if len(config.default_channels) > 3 * config.panels:
            raise ConfigError(
                f"channels: {len(config.default_channels)} channels are more than the {3 * config.panels} of an image of panels: "
                f"{config.panels}; set panels: {-(-len(config.default_channels) // 3)}"
            )
        if config.info is not None:
            image = config.resolved_info.image
            one = image.model_copy(update={"height": image.height // config.panels})
            require_multiple(one, config.patch_size, "patch_size")
        depth = max(take_layers(config.layers, config.depth))
        return ChannelVit(config, depth, config.final_norm and depth == config.depth)

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: ChannelVitConfig) -> dict[str, Tensor]:
        """The authors' fixed-list class stores the channel table as ``(1, D, C, 1, 1)``."""
        renamed = {}
        for key, value in state.items():
            if key.endswith("patch_embed.channel_embed") and value.ndim == 5:
                key, value = f"{key}.weight", value[0, :, :, 0, 0].T
            renamed[key] = value
        return renamed

    def forward(
        self,
        pixels: Tensor,
        *,
        scene_ids: Tensor | None = None,
        return_attention: bool = False,
        channels: Tensor | None = None,
    ) -> VisionFeatures:
        """pixels ``(B, c, H, W)``, or ``(B, 3, panels · H, W)`` as the processor makes them, of which the first c channels are taken;
        channels ``(B, c)`` or ``(c,)``: ids of the channels in the table, which may differ between images. Raises `ConfigError` where
        their number is another than the pixels'."""
        if return_attention:
            raise UnavailableError("return_attention: channelvit uses fused attention, which hands out no weights")
        if channels is not None and channels.ndim == 1:
            channels = channels.expand(len(pixels), -1)
        image, panels = self.config.resolved_info.image, self.config.panels
        expected = len(self.config.default_channels) if channels is None else channels.shape[-1]
        height = image.height // panels
        if pixels.ndim == 4 and panels > 1 and tuple(pixels.shape[1:]) == (3, image.height, image.width):
            pixels = planes_of(pixels, panels)[:, :expected]
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (expected, height, image.width):
            raise ConfigError(
                f"channelvit encoder: expected pixels (B, {expected}, {height}, {image.width}), got "
                f"{tuple(pixels.shape)}; name the channels they bring (channels), or set image_size"
            )
        pixels = pixels.to(self.dtype)
        if channels is None:
            ids = torch.tensor(self.config.default_channels, device=pixels.device)
            channels = ids.expand(len(pixels), -1)
        elif channels.numel():
            _check_ids(channels.unique().tolist(), self.config.num_channels, "channels of the call")
        if len(pixels) == 0:
            return self.empty_features(pixels)
        return merge_layers(self._read(pixels, channels), self.config.keep_prefix)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        """Of pixels with the config's channels; used to measure sizes."""
        ids = torch.tensor(self.config.default_channels, device=pixels.device).expand(len(pixels), -1)
        return self._read(planes_of(pixels, self.config.panels)[:, :1].expand(-1, ids.shape[1], -1, -1), ids)

    def _read(self, pixels: Tensor, channels: Tensor) -> list[LayerOutput]:
        if self.training and self.config.sample_channels:
            kept = self._sample(pixels.shape[1]).to(pixels.device)
            pixels, channels = pixels[:, kept], channels[:, kept]
        self.model.recompute = self.recompute
        outputs = self.model(pixels, channels)
        size = self.config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        return [self._arrange(outputs[c], grid) for c in take_layers(self.config.layers, self.config.depth)]

    def _arrange(self, x: Tensor, grid: tuple[int, int]) -> LayerOutput:
        tokens, prefix = x[:, 1:], x[:, :1]
        apart = tokens.unflatten(1, (-1, grid[0] * grid[1]))
        if self.config.merge == "mean":
            return LayerOutput(apart.mean(1), grid, prefix)
        if self.config.merge == "concat":
            return LayerOutput(apart.transpose(1, 2).flatten(2), grid, prefix)
        return LayerOutput(tokens, (grid[0] * apart.shape[1], grid[1]), prefix)

    @staticmethod
    def _sample(count: int) -> Tensor:
        """Positions of the channels that a batch keeps: first how many, then which."""
        keep = int(torch.randint(1, count + 1, ()))
        return torch.randperm(count)[:keep].sort().values


def _check_ids(ids: list[int], count: int, where: str) -> None:
    wrong = [i for i in ids if not 0 <= i < count]
    if wrong:
        raise ConfigError(f"{where}: no channel {wrong[0]}; the table has {count} (num_channels), so 0 to {count - 1}")
