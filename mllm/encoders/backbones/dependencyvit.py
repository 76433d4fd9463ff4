"""What does DependencyViT see: messages that each token hands up to its parents (arXiv 2304.03282, after a third party's port)?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import Mlp, drop, drop_rates, init_linear, run, token_table
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.encoders.weights import resize_positions
from mllm.errors import ConfigError

_EPS = 1e-6
_TEMPERATURE = 0.1


class DependencyVitConfig(BackboneConfig):
    """DependencyViT; defaults are the tiny one. The authors published no code: this follows an unmerged port by one person, whose
    notes leave open the biases of selector and controller, where the last weighting stands, and which score prunes."""

    width: int = Field(default=192, gt=0)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    patch_size: int = Field(default=16, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    trained_size: int = Field(default=224, gt=0)
    """Image size of the position table, which is resized."""
    prune_after: list[int] = Field(default_factory=list)
    """Blocks, counted from 1, after whose attention tokens with little to say are left out (Lite: 2, 5, 8, 11)."""
    prune_ratio: float = Field(default=0.16, gt=0, lt=1)
    """Share of the first number of tokens that is left out each time."""


class ReversedAttention(nn.Module):
    """``(B, N, D)`` and what each token's messages weigh ``(B, N)`` → the same, after this layer's controller; with the weights
    ``(B, heads, N, N)`` of parents (rows) for children (columns)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_selector = nn.Linear(width, num_heads, bias=False)
        self.message_controller = nn.ModuleDict(
            {"fc1": nn.Linear(width, width // 2, bias=False), "fc2": nn.Linear(width // 2, 1, bias=False)}
        )
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        heads = (self.head_selector(x) / _TEMPERATURE).softmax(-1).transpose(1, 2)
        control = self.message_controller
        messages = messages * control["fc2"](F.gelu(control["fc1"](x)))[..., 0].sigmoid()
        of_children = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        weights = of_children.transpose(-1, -2) * (heads * messages[:, None])[:, :, None]
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), messages, weights


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention from children to parents, then an MLP. keep: how many tokens go on to the MLP, those with the largest messages."""

    def __init__(self, config: DependencyVitConfig, rate: float):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = ReversedAttention(width, config.num_heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.ls2 = LayerScale(width)
        self.drop_path = drop(rate)
        self.share: float | None = None

    def forward(self, x: Tensor, messages: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, messages, _ = self.attn(self.norm1(x), messages)
        x = x + self.drop_path(self.ls1(y))
        if self.share is not None:
            kept = messages.topk(int(self.share * x.shape[1]), dim=1).indices.sort(1).values
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
            messages, places = messages.gather(1, kept), places.gather(1, kept)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))), messages, places


class PatchEmbed(nn.Module):
    def __init__(self, config: DependencyVitConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class DependencyVit(nn.Module):
    """Pixels to tokens, their messages and their places, under the port's names."""

    recompute = False

    def __init__(self, config: DependencyVitConfig, depth: int, last_norm: bool):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.trained_size // config.patch_size
        self.pos_embed = token_table(1, self.side**2, config.width)
        self.patch_embed = PatchEmbed(config)
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(Block(config, rates[i]) for i in range(depth))
        for number, after in enumerate(config.prune_after, start=1):
            if after <= depth:
                ratio = config.prune_ratio
                self.blocks[after - 1].share = (1 - ratio * number) / (1 - ratio * (number - 1))  # type: ignore[union-attr]
        self.norm = nn.LayerNorm(config.width, eps=_EPS) if last_norm else None
        self.apply(init_linear)

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(B, N, D)``, messages of 1 and places 0 … N - 1, both ``(B, N)``."""
        x = self.patch_embed(pixels)
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        x = x + resize_positions(self.pos_embed, (self.side, self.side), grid)
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return x, x.new_ones(x.shape[:2]), places

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, messages and places before the first block and after each, the last tokens normed where there is a norm."""
        outputs = [self.embed(pixels)]
        for block in self.blocks:
            outputs.append(run(block, *outputs[-1], recompute=self.recompute))
        if self.norm is not None:
            x, messages, places = outputs[-1]
            outputs[-1] = (self.norm(x), messages, places)
        return outputs

    def dependencies(self, pixels: Tensor) -> list[Tensor]:
        """``(B, N, N)`` of every block: what each child (column) hands to each parent (row), over all heads."""
        x, messages, places = self.embed(pixels)
        found = []
        for block in self.blocks:
            found.append(block.attn(block.norm1(x), messages)[2].sum(1))  # type: ignore[operator, union-attr]
            x, messages, places = block(x, messages, places)
        return found


class DependencyVitEncoder(BackboneEncoder):
    """Tokens times their messages. A model that prunes has no grid: its tokens are one row, in raster order, and
    ``last_places`` ``(B, N)`` says where they lie."""

    Config: ClassVar[type[EncoderConfig]] = DependencyVitConfig
    config: DependencyVitConfig
    model: DependencyVit
    last_places: Tensor | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "trained_size": 16, "mlp_ratio": 2.0}
        return {"type": "dependencyvit", **sizes, "image_size": [16, 20]}

    @classmethod
    def build(cls, config: DependencyVitConfig) -> DependencyVit:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if config.trained_size % config.patch_size:
            raise ConfigError(f"trained_size: {config.trained_size} is no multiple of patch_size {config.patch_size}")
        if any(not 1 <= after <= config.depth for after in config.prune_after) or sorted(
            set(config.prune_after)
        ) != list(config.prune_after):
            raise ConfigError(
                f"prune_after: expected blocks from 1 to {config.depth} in order, got {config.prune_after}"
            )
        if config.prune_ratio * len(config.prune_after) >= 1:
            raise ConfigError(
                f"prune_ratio: {config.prune_ratio} after {len(config.prune_after)} blocks leaves no token"
            )
        if config.prune_after and len(config.layers) > 1:
            raise ConfigError("layers: a model that prunes has other tokens in every layer; name one layer")
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "patch_size")
        depth = max(take_layers(config.layers, config.depth))
        return DependencyVit(config, depth, config.final_norm and depth == config.depth)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs, result = self.model(pixels), []
        size = self.config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        for count in take_layers(self.config.layers, self.config.depth):
            x, messages, places = outputs[count]
            whole = x.shape[1] == grid[0] * grid[1]
            self.last_places = None if whole else places
            result.append(LayerOutput(x * messages[..., None], grid if whole else (1, x.shape[1])))
        return result
