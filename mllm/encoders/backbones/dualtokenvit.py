"""What does a backbone in the spirit of DualToken-ViT see: image tokens beside a few that know their places (arXiv 2309.12424)?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import (
    DepthwiseConv,
    Mlp,
    SelfAttention,
    drop,
    drop_rates,
    init_linear,
    run,
    token_table,
)
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import LayerOutput, take_layers
from mllm.errors import ConfigError

Three = tuple[int, int, int]
_EPS = 1e-6
_STRIDES = (8, 16, 32)


class DualTokenVitConfig(BackboneConfig):
    """Three stages at strides 8, 16 and 32. The paper's code is not public and its text leaves details open (how local and global
    parts are weighed, widths and depths of the variants): no claim to its numbers is made. Stem, merging and the gate after the MLP
    are LightViT's (Apache-2.0)."""

    widths: Three = (64, 128, 256)
    depths: Three = (2, 6, 6)
    num_heads: Three = (2, 4, 8)
    mlp_ratio: float = Field(default=4.0, gt=0)
    side: int = Field(default=7, ge=1)
    """Rows and columns of the tokens that are carried through all stages."""


class Stem(nn.Module):
    """``(B, 3, H, W)`` → ``(B, H / 8, W / 8, C)``."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        layers: list[nn.Module] = [nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.GELU()]
        for stride in (1, 1, 2):
            layers += [nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half), nn.GELU()]
        self.convs = nn.Sequential(*layers, nn.Conv2d(half, width, 3, 2, 1))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.convs(pixels).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """``(B, rows, cols, C)`` → half the rows and columns of C'; tokens ``(B, M, C)`` → C'."""

    def __init__(self, width: int, after: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, after, bias=False)
        self.pooled = nn.Linear(width, after, bias=False)
        self.token_norm = nn.LayerNorm(width)
        self.token_proj = nn.Linear(width, after, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        parts = [x[:, r::2, c::2] for r in (0, 1) for c in (0, 1)]
        highest = torch.stack(parts).amax(0)
        merged = self.reduction(self.norm(torch.cat(parts, dim=-1))) + self.pooled(highest)
        return merged, self.token_proj(self.token_norm(tokens))


class TwoWayGate(nn.Module):
    """LightViT's gate on an MLP's output: by channel from the mean, by place from both."""

    def __init__(self, width: int):
        super().__init__()
        inner = max(width // 4, 1)
        self.norm = nn.LayerNorm(width)
        self.whole, self.local = nn.Linear(width, inner), nn.Linear(width, inner)
        self.channel, self.spatial = nn.Linear(inner, width), nn.Linear(2 * inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        whole = F.gelu(self.whole(normed.mean((1, 2), keepdim=True)))
        local = F.gelu(self.local(normed))
        place = self.spatial(torch.cat([local, whole.expand_as(local)], dim=-1)).sigmoid()
        return x * (self.channel(whole).sigmoid() * place)


class PlaceTokens(nn.Module):
    """A map step by step down to the tokens' grid, then attention among its places."""

    def __init__(self, width: int, num_heads: int, steps: int, side: int):
        super().__init__()
        self.side = side
        self.steps = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width) for _ in range(steps))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.attn = SelfAttention(width, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, rows, cols, C)`` → ``(B, side², C)``."""
        x = x.permute(0, 3, 1, 2)
        for step in self.steps:
            x = F.gelu(step(x))
        x = F.adaptive_avg_pool2d(x, self.side).flatten(2).transpose(1, 2)
        return x + self.attn(self.norm(x))


class Broadcast(nn.Module):
    """Image tokens read the few that know the whole."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (part.transpose(1, 2) for part in self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y).unflatten(1, x.shape[1:3])


class Block(nn.Module):
    """A map ``(B, rows, cols, C)`` and the tokens carried along ``(B, M, C)`` → both."""

    def __init__(self, config: DualTokenVitConfig, stage: int, rate: float):
        super().__init__()
        width, heads = config.widths[stage], config.num_heads[stage]
        self.local = DepthwiseConv(width, 7)
        self.local_norm = nn.LayerNorm(width, eps=_EPS)
        self.local_mlp = Mlp(width, int(width * config.mlp_ratio))
        self.places = PlaceTokens(width, heads, max(2 - stage, 0), config.side)
        self.share = nn.Parameter(torch.zeros(width))
        self.token_norm, self.token_mlp = nn.LayerNorm(width, eps=_EPS), Mlp(width, int(width * config.mlp_ratio))
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.broadcast = Broadcast(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp, self.gate = Mlp(width, int(width * config.mlp_ratio)), TwoWayGate(width)
        self.drop_path = drop(rate)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        local = x + self.drop_path(self.local_mlp(self.local_norm(self.local(x))))
        share = self.share.sigmoid()
        tokens = share * tokens + (1 - share) * self.places(local)
        tokens = tokens + self.token_mlp(self.token_norm(tokens))
        x = local + self.drop_path(self.broadcast(self.norm1(local), tokens))
        return x + self.drop_path(self.gate(self.mlp(self.norm2(x)))), tokens


class DualTokenVit(nn.Module):
    """Pixels to maps and carried tokens of the stages."""

    recompute = False

    def __init__(self, config: DualTokenVitConfig, num_stages: int, last_norm: bool):
        super().__init__()
        self.stem = Stem(config.widths[0])
        self.tokens = token_table(1, config.side**2, config.widths[0])
        rates = iter(drop_rates(config.drop_path, sum(config.depths)))
        self.merges = nn.ModuleList(Merge(*config.widths[s : s + 2]) for s in range(num_stages - 1))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(config, s, next(rates)) for _ in range(config.depths[s])) for s in range(num_stages)
        )
        self.norm = nn.LayerNorm(config.widths[-1], eps=_EPS) if last_norm else None
        self.apply(init_linear)

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        x, tokens = self.stem(pixels), self.tokens.expand(len(pixels), -1, -1)
        outputs = []
        for stage, blocks in enumerate(self.stages):
            if stage:
                x, tokens = self.merges[stage - 1](x, tokens)
            for block in blocks:  # type: ignore[attr-defined]
                x, tokens = run(block, x, tokens, recompute=self.recompute)
            outputs.append((x, tokens))
        if self.norm is not None:
            outputs[-1] = (self.norm(x), self.norm(tokens))
        return outputs


class DualTokenVitEncoder(BackboneEncoder):
    """``layers`` counts stages. Prefix: the tokens that are carried through all stages, on their own grid."""

    Config: ClassVar[type[EncoderConfig]] = DualTokenVitConfig
    config: DualTokenVitConfig
    model: DualTokenVit

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "dualtokenvit",
            "widths": [8, 16, 24],
            "depths": [1, 1, 2],
            "num_heads": [1, 2, 2],
            "mlp_ratio": 2.0,
            "side": 2,
            "image_size": [64, 96],
            "keep_prefix": True,
        }

    @classmethod
    def build(cls, config: DualTokenVitConfig) -> DualTokenVit:
        for stage, heads in enumerate(config.num_heads):
            if config.widths[stage] % heads:
                raise ConfigError(f"num_heads: {heads} of stage {stage} do not divide width {config.widths[stage]}")
        needed = max(take_layers(config.layers, 3, lowest=1))
        if config.info is not None:
            require_multiple(config.info.image, _STRIDES[needed - 1], "stages halve the map exactly")
        return DualTokenVit(config, needed, config.final_norm and needed == 3)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs = self.model(pixels)
        chosen = [outputs[c - 1] for c in take_layers(self.config.layers, 3, lowest=1)]
        return [LayerOutput(x.flatten(1, 2), (x.shape[1], x.shape[2]), tokens) for x, tokens in chosen]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        groups, number = [("embeddings", ["model.stem.", "model.tokens"])], 0
        for stage, blocks in enumerate(self.model.stages):
            for i in range(len(blocks)):  # type: ignore[arg-type]
                before = [f"model.merges.{stage - 1}."] if stage and i == 0 else []
                groups.append((f"layers.{number}", [*before, f"model.stages.{stage}.{i}."]))
                number += 1
        return [*groups, ("norm", ["model.norm."])] if self.model.norm is not None else groups
