"""What does DuoFormer see: the scales of a ResNet, region by region (arXiv 2506.12982)?"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import Block, SelfAttention, drop_rates, init_linear, run
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, group_parameters, take_layers
from mllm.encoders.weights import resize_positions
from mllm.errors import ConfigError
from mllm.types import Grid

_STRIDE = 32
_TRAINED: Grid = (7, 7)
_TABLE_STD = 0.036


class DuoFormerConfig(BackboneConfig):
    """DuoFormer; defaults are the authors' with ResNet-50 and three scales."""

    cnn: Literal["resnet18", "resnet50"] = "resnet50"
    cnn_channels: tuple[int, int, int, int] | None = None
    """Inner channels of the CNN's stages. Default: its own (64 to 512)."""
    scales: Literal[2, 3, 4] = 3
    """How many of the CNN's scales become tokens of a region, from the coarsest."""
    width: int = Field(default=768, gt=0)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    scale_token: Literal["learned", "channels"] = "learned"
    """The token that gathers a region's scales: one for all regions, or made from the maps of all four stages."""
    output: Literal["regions", "patches"] = "regions"
    """regions: what each region gathered from its scales. patches: after the authors' attention across regions, which
    has neither norms nor residuals and makes regions alike."""
    patch_residual: bool = False
    """Residuals around the attention across regions; not the authors'."""
    patch_qk_norm: bool = False
    """Norms on its queries and keys, which the authors' code gets where its attention dropout is not 0."""

    @property
    def tokens_per_region(self) -> int:
        return 1 + sum(4**i for i in range(self.scales))


class ScaleToken(nn.Module):
    """The CNN's four maps → one token per region ``(B, D, rows, cols)``."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        first, second = channels[:2]
        self.chann_proj1 = nn.ModuleDict({f"conv{i}": nn.Conv2d(first, first, 3, 2, 1) for i in (1, 2)})
        self.chann_proj2 = nn.ModuleDict({"conv1": nn.Conv2d(second, second, 3, 2, 1)})
        widths = [sum(channels), width, width, width]
        self.chann_proj_all = nn.ModuleDict(
            {
                "nConvs": nn.ModuleList(
                    nn.ModuleDict({"conv": nn.Conv2d(before, width, 3, padding=1), "norm": nn.BatchNorm2d(width)})
                    for before in widths
                )
            }
        )

    def gather(self, maps: list[Tensor]) -> Tensor:
        """The maps at the coarsest one's size, side by side."""
        first = self.chann_proj1["conv2"](self.chann_proj1["conv1"](maps[0]))
        second = self.chann_proj2["conv1"](maps[1])
        return torch.cat([*(F.max_pool2d(x, 2) for x in (first, second, maps[2])), maps[3]], dim=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.gather(maps)
        for layer in self.chann_proj_all["nConvs"]:  # type: ignore[union-attr]
            x = F.relu(layer["norm"](layer["conv"](x)))
        return x


class PatchAttention(nn.Module):
    """Attention across regions, bare as the authors have it."""

    def __init__(self, config: DuoFormerConfig):
        super().__init__()
        self.attn = SelfAttention(config.width, config.num_heads, qk_norm=config.patch_qk_norm)
        self.residual = config.patch_residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x) if self.residual else self.attn(x)


class MultiscaleFormer(nn.Module):
    """Tokens of regions ``(B, R, T, D)`` through attention inside regions, then across them."""

    def __init__(self, config: DuoFormerConfig, depth: int):
        super().__init__()
        width = config.width
        self.pos_embed_for_scale = nn.Parameter(_table(1, 1, config.tokens_per_region, width))
        across = config.output == "patches"
        if across:
            self.cls_token = nn.Parameter(torch.randn(1, 1, width) * _TABLE_STD)
            self.pos_embed = nn.Parameter(_table(1, 1 + _TRAINED[0] * _TRAINED[1], width))
        rates = drop_rates(config.drop_path, config.depth)
        self.scaleBlocks = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_ratio, drop_path=rates[i]) for i in range(depth)
        )
        self.blocks = nn.ModuleList(PatchAttention(config) for _ in range(config.depth if across else 0))

    def inside(self, tokens: Tensor, recompute: bool) -> list[Tensor]:
        """A region's first token ``(B, R, D)``, before the first block and after each."""
        batch = tokens.shape[0]
        x = (tokens + self.pos_embed_for_scale).flatten(0, 1)
        outputs = [x[:, 0]]
        for block in self.scaleBlocks:
            x = run(block, x, recompute=recompute)
            outputs.append(x[:, 0])
        return [out.unflatten(0, (batch, -1)) for out in outputs]

    def across(self, regions: Tensor, grid: Grid, recompute: bool) -> Tensor:
        """``(B, R, D)`` → ``(B, 1 + R, D)``, the class token first."""
        x = torch.cat([self.cls_token.expand(len(regions), -1, -1), regions], dim=1)
        positions = self.pos_embed
        if grid != _TRAINED:
            positions = resize_positions(positions, _TRAINED, grid, num_prefix_tokens=1)
        x = x + positions
        for block in self.blocks:
            x = run(block, x, recompute=recompute)
        return x


class DuoFormer(nn.Module):
    """Pixels to a token per region of 32 × 32 pixels, under the authors' names."""

    recompute = False

    def __init__(self, config: DuoFormerConfig, depth: int):
        super().__init__()
        cnn = _cnn(config)
        channels = [int(info["num_chs"]) for info in cnn.feature_info[1:]]
        stages = {"4": cnn.layer1, "5": cnn.layer2, "6": cnn.layer3, "7": cnn.layer4}
        self.resnet_projector = nn.ModuleDict({"0": cnn.conv1, "1": cnn.bn1, **stages})
        self.used = [3, 2, 1, 0][: config.scales]
        self.projection = nn.ModuleDict({f"proj_heads{s}": _projection(channels[s], config.width) for s in self.used})
        if config.scale_token == "learned":
            self.channel_token = nn.Parameter(torch.randn(1, 1, 1, config.width) * _TABLE_STD)
            self.scale_token = None
        else:
            self.scale_token = ScaleToken(channels, config.width)
        self.vision_transformer = MultiscaleFormer(config, depth)
        self.vision_transformer.apply(init_linear)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The CNN's four stages, at strides 4, 8, 16 and 32."""
        recompute = self.recompute and not self.resnet_projector["1"].training  # a batch norm would count images twice
        stem = F.relu(self.resnet_projector["1"](self.resnet_projector["0"](pixels)))
        x, maps = F.max_pool2d(stem, 3, stride=2, padding=1), []
        for name in ("4", "5", "6", "7"):
            x = run(self.resnet_projector[name], x, recompute=recompute)
            maps.append(x)
        return maps

    def tokens(self, maps: list[Tensor]) -> Tensor:
        """``(B, R, T, D)``: of each region its scale token, then its places from the coarsest scale to the finest."""
        parts = [to_regions(self.projection[f"proj_heads{s}"](maps[s]), 8 >> s, by_column=s == 2) for s in self.used]
        if self.scale_token is None:
            first = self.channel_token.expand(*parts[0].shape[:2], -1, -1)
        else:
            first = to_regions(self.scale_token(maps), 1)
        return torch.cat([first, *parts], dim=2)


def to_regions(x: Tensor, side: int, *, by_column: bool = False) -> Tensor:
    """``(B, D, rows, cols)`` → ``(B, R, side², D)``; a region's places row by row, or column by column."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, D, R rows, side, R cols, side)
    order = (0, 2, 4, 5, 3, 1) if by_column else (0, 2, 4, 3, 5, 1)
    return x.permute(order).flatten(3, 4).flatten(1, 2)


def _cnn(config: DuoFormerConfig) -> Any:
    options: dict[str, Any] = {"channels": config.cnn_channels} if config.cnn_channels else {}
    return timm.create_model(config.cnn, pretrained=False, num_classes=0, **options)


def _projection(channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, 1)
    nn.init.kaiming_normal_(conv.weight)
    nn.init.normal_(conv.bias, std=1e-6)  # type: ignore[arg-type]
    return conv


def _table(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=_TABLE_STD)


class DuoFormerEncoder(BackboneEncoder):
    """One token per region, stride 32. The authors' runs at 224 only; other multiples of 32 are an extension, in which
    positions of ``output: patches`` are resized. ``layers`` counts the blocks inside regions. Prefix (patches only):
    the class token."""

    Config: ClassVar[type[EncoderConfig]] = DuoFormerConfig
    config: DuoFormerConfig
    model: DuoFormer

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "duoformer",
            "cnn": "resnet18",
            "cnn_channels": [8, 8, 16, 16],
            "scales": 3,
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "image_size": [64, 96],
        }

    @classmethod
    def build(cls, config: DuoFormerConfig) -> DuoFormer:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if config.output == "patches" and config.layers != [-1]:
            raise ConfigError("layers: output patches follows the last block, so layers is [-1]")
        if config.output == "regions" and config.keep_prefix:
            raise ConfigError("keep_prefix: regions have no class token; set output: patches or remove the key")
        if config.info is not None:
            require_multiple(config.info.image, _STRIDE, "a region is 32 x 32 pixels")
        return DuoFormer(config, max(take_layers(config.layers, config.depth)))

    @classmethod
    def published_names(cls, config: DuoFormerConfig) -> set[str]:
        rest = {f"vision_transformer.{part}.{kind}" for part in ("fc_norm", "head") for kind in ("weight", "bias")}
        changes = {"output": "patches", "keep_prefix": False}
        return super().published_names(config.model_copy(update=changes)) | rest

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: DuoFormerConfig) -> dict[str, Tensor]:
        """The three heads that make the scale token stand beside the CNN in the authors' model."""
        heads = re.compile(r"(^|\.)(?<!scale_token\.)chann_proj")
        return {heads.sub(r"\1scale_token.chann_proj", key): value for key, value in state.items()}

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        maps = self.model.maps(pixels)
        grid = (maps[3].shape[2], maps[3].shape[3])
        former = self.model.vision_transformer
        outputs = former.inside(self.model.tokens(maps), self.recompute)
        if self.config.output == "patches":
            x = former.across(outputs[-1], grid, self.recompute)
            return [LayerOutput(x[:, 1:], grid, x[:, :1])]
        return [LayerOutput(outputs[count], grid) for count in take_layers(self.config.layers, self.config.depth)]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        former = self.model.vision_transformer
        counts = {"scaleBlocks": len(former.scaleBlocks), "blocks": len(former.blocks)}
        layers = [f"model.vision_transformer.{name}.{i}." for name, count in counts.items() for i in range(count)]
        return group_parameters([name for name, _ in self.named_parameters()], layers)
