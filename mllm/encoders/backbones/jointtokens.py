"""What do learned tokens, one for each joint of a body, see among a picture's patches (EViTPose, UniTransPose)?"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, BackboneEncoder, require_multiple
from mllm.encoders.backbones.layers import (
    Block,
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
from mllm.encoders.weights import resize_positions
from mllm.errors import ConfigError

Four = tuple[int, int, int, int]
_EPS = 1e-6


class EvitPoseConfig(BackboneConfig):
    """EViTPose (BMVC 2023): a ViT whose joint tokens choose the patches that are worked on further. Paper only: how the scores are
    made is not public, here they are the joint tokens' attention. No claim to its numbers is made."""

    width: int = Field(default=384, gt=0)
    depth: int = Field(default=12, gt=0)
    num_heads: int = Field(default=12, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch_size: int = Field(default=16, gt=0)
    trained_size: tuple[int, int] = (256, 192)
    """Image size (height, width) of the position table, which is resized for another."""
    num_joints: int = Field(default=23, gt=0)
    choose_after: int = Field(default=3, ge=1)
    """The block after which patches are chosen."""
    keep: float = Field(default=0.6, gt=0, le=1)
    """Share of the patches that the later blocks work on; the others stay as they are. 1: all."""


class EvitPose(nn.Module):
    """Pixels to joint tokens and patches in raster order."""

    recompute = False

    def __init__(self, config: EvitPoseConfig, depth: int, last_norm: bool):
        super().__init__()
        self.num_joints, self.choose_after, self.keep = config.num_joints, config.choose_after, config.keep
        self.side = tuple(side // config.patch_size for side in config.trained_size)
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed = token_table(1, self.side[0] * self.side[1], config.width)
        self.joint_tokens = token_table(1, config.num_joints, config.width)
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_ratio, drop_path=rates[i]) for i in range(depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=_EPS) if last_norm else None
        self.apply(init_linear)

    def scores(self, x: Tensor) -> Tensor:
        """``(B, N)``: the attention that the joint tokens of ``(B, J + N, D)`` would pay to each patch in the next block, summed."""
        block: Any = self.blocks[self.choose_after]
        attention, joints = block.attn, self.num_joints
        q, k, _ = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        q, k = attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2)
        logits = q[:, :, :joints].float() @ k[:, :, joints:].float().transpose(-1, -2)
        return (logits * q.shape[-1] ** -0.5).softmax(-1).sum((1, 2))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """``(B, J + N, D)`` before the first block and after each, the last one normed where there is a norm."""
        x = self.patch_embed(pixels)
        positions = self.pos_embed
        if (x.shape[2], x.shape[3]) != self.side:
            positions = resize_positions(positions, self.side, (x.shape[2], x.shape[3]))  # type: ignore[arg-type]
        x = torch.cat([self.joint_tokens.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2) + positions], dim=1)
        outputs, chosen = [x], None
        for number, block in enumerate(self.blocks):
            if number == self.choose_after and self.keep < 1:
                chosen = self._choose(x)
            if chosen is None:
                x = run(block, x, recompute=self.recompute)
            else:
                worked = run(block, x.gather(1, chosen), recompute=self.recompute)
                x = x.scatter(1, chosen, worked.to(x.dtype))
            outputs.append(x)
        if self.norm is not None:
            outputs[-1] = self.norm(outputs[-1])
        return outputs

    def _choose(self, x: Tensor) -> Tensor:
        """``(B, J + K, D)``: places of the joints and of the chosen patches, for gather and scatter."""
        count = max(round(self.keep * (x.shape[1] - self.num_joints)), 1)
        best = self.scores(x).topk(count, dim=1).indices.sort(1).values + self.num_joints
        joints = torch.arange(self.num_joints, device=x.device).expand(len(x), -1)
        return torch.cat([joints, best], dim=1)[..., None].expand(-1, -1, x.shape[2])


class EvitPoseEncoder(BackboneEncoder):
    """Patches in raster order, those that no joint looked for as they were when the choice was made. Prefix: the joint tokens."""

    Config: ClassVar[type[EncoderConfig]] = EvitPoseConfig
    config: EvitPoseConfig
    model: EvitPose

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"width": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 4, "trained_size": [16, 12]}
        joints = {"num_joints": 5, "choose_after": 1, "keep_prefix": True}
        return {"type": "evitpose", **sizes, **joints, "image_size": [16, 20]}

    @classmethod
    def build(cls, config: EvitPoseConfig) -> EvitPose:
        if config.width % config.num_heads:
            raise ConfigError(f"num_heads: {config.num_heads} do not divide width {config.width}")
        if any(side % config.patch_size for side in config.trained_size):
            raise ConfigError(f"trained_size: {config.trained_size} is no multiple of patch_size {config.patch_size}")
        if config.info is not None:
            require_multiple(config.info.image, config.patch_size, "patch_size")
        if config.choose_after >= config.depth and config.keep < 1:
            raise ConfigError(
                f"choose_after: no block comes after block {config.choose_after} of {config.depth}; choose earlier, or set keep: 1"
            )
        depth = max(take_layers(config.layers, config.depth))
        return EvitPose(config, depth, config.final_norm and depth == config.depth)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs, size, joints = self.model(pixels), self.config.patch_size, self.config.num_joints
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        chosen = [outputs[c] for c in take_layers(self.config.layers, self.config.depth)]
        return [LayerOutput(x[:, joints:], grid, x[:, :joints]) for x in chosen]


class UniTransPoseConfig(BackboneConfig):
    """UniTransPose (TPAMI 2026): four stages of attention in windows and, beside it, a way through a few latents that see the whole
    picture at a cost that grows with the number of patches only. Paper only: sizes are not public, no claim to its numbers is made."""

    widths: Four = (64, 128, 256, 512)
    depths: Four = (2, 2, 6, 2)
    num_heads: Four = (2, 4, 8, 16)
    mlp_ratio: float = Field(default=4.0, gt=0)
    window: int = Field(default=7, gt=0)
    """Rows and columns of patches that see each other directly; maps are padded to a multiple, and padding is not seen."""
    latents: Literal["learned", "pooled"] = "learned"
    """learned: tokens of the model (the paper's joint tokens); pooled: the picture's own, means over a square of cells (LookupViT's
    idea)."""
    num_latents: int = Field(default=23, gt=0)
    """How many; pooled needs a square number."""


class Read(nn.Module):
    """Multi-head attention of ``(B, N, C)`` to ``(B, M, C)``."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(other).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatherMixScatter(nn.Module):
    """Latents ``(B, M, C)`` gather from patches ``(B, N, C)``, mix among themselves, and are scattered back: linear in N."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm_patches, self.norm_latents = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.norm_mix, self.norm_back = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.gather, self.scatter = Read(width, num_heads), Read(width, num_heads)
        self.mix = SelfAttention(width, num_heads)

    def forward(self, patches: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be added to the patches, and the latents."""
        normed = self.norm_patches(patches)
        latents = latents + self.gather(self.norm_latents(latents), normed)
        latents = latents + self.mix(self.norm_mix(latents))
        return self.scatter(normed, self.norm_back(latents)), latents


class JaglBlock(nn.Module):
    """Attention in windows and through the latents, then an MLP, on maps ``(B, rows, cols, C)``."""

    def __init__(self, width: int, num_heads: int, config: UniTransPoseConfig, rate: float):
        super().__init__()
        self.window = config.window
        self.position = DepthwiseConv(width, 3)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.local = Windows(width, num_heads, config.window)
        self.wide = GatherMixScatter(width, num_heads)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = drop(rate)

    def forward(self, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.position(x)
        wide, latents = self.wide(x.flatten(1, 2), latents)
        x = x + self.drop_path(self.local(self.norm1(x)) + wide.view_as(x))
        return x + self.drop_path(self.mlp(self.norm2(x))), latents


class Windows(nn.Module):
    """Attention of patches ``(B, rows, cols, C)`` within squares."""

    def __init__(self, width: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, cols, side = x.shape[1], x.shape[2], self.window
        down, across = -rows % side, -cols % side
        padded = F.pad(x, (0, 0, 0, across, 0, down))
        cells = _squares(padded, side)
        q, k, v = self.qkv(cells).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        seen = None
        if down or across:
            inside = F.pad(torch.ones(1, rows, cols, 1, dtype=torch.bool, device=x.device), (0, 0, 0, across, 0, down))
            seen = _squares(inside, side)[:, :, None, None, :, 0]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(2, 3).flatten(3)
        y = (
            y.unflatten(1, (padded.shape[1] // side, -1))
            .unflatten(3, (side, side))
            .transpose(2, 3)
            .flatten(3, 4)
            .flatten(1, 2)
        )
        return self.proj(y[:, :rows, :cols])


def _squares(x: Tensor, side: int) -> Tensor:
    """``(B, rows, cols, C)`` → ``(B, squares, side², C)``."""
    cells = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)


class UniTransPose(nn.Module):
    """Pixels to the map of every stage and its latents."""

    recompute = False

    def __init__(self, config: UniTransPoseConfig, num_stages: int, last_norm: bool):
        super().__init__()
        widths, count = config.widths[:num_stages], config.num_latents
        self.pooled_side = math.isqrt(count) if config.latents == "pooled" else 0
        if not self.pooled_side:
            self.joint_tokens = token_table(1, count, widths[0])
        half = widths[0] // 2
        stem = [nn.Conv2d(3, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU(), nn.Conv2d(half, widths[0], 3, 2, 1)]
        self.downsample = nn.ModuleList([nn.Sequential(*stem)])
        self.widen = nn.ModuleList()
        for before, after in itertools.pairwise(widths):
            self.downsample.append(nn.Conv2d(before, after, 3, 2, 1))
            self.widen.append(nn.Linear(before, after))
        rates = iter(drop_rates(config.drop_path, sum(config.depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                JaglBlock(widths[s], config.num_heads[s], config, next(rates)) for _ in range(config.depths[s])
            )
            for s in range(num_stages)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=_EPS) if last_norm else None
        self.apply(init_linear)

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Map ``(B, rows, cols, C)`` and latents ``(B, M, C)`` after every stage, the last ones normed where there is a norm."""
        x, latents, outputs = pixels, None, []
        for s, blocks in enumerate(self.stages):
            if s:
                x = x.permute(0, 3, 1, 2)
            x = self.downsample[s](x).permute(0, 2, 3, 1)
            if latents is None:
                latents = self._first(x)
            else:
                latents = self.widen[s - 1](latents)
            for block in blocks:  # type: ignore[union-attr]
                x, latents = run(block, x, latents, recompute=self.recompute)
            outputs.append((x, latents))
        if self.norm is not None:
            outputs[-1] = (self.norm(x), self.norm(latents))
        return outputs

    def _first(self, x: Tensor) -> Tensor:
        if self.pooled_side:
            return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.pooled_side).flatten(2).transpose(1, 2)
        return self.joint_tokens.expand(len(x), -1, -1)


class UniTransPoseEncoder(BackboneEncoder):
    """A stage's patches, or those of several on the last one's grid. Prefix: the latents, one for each joint where they are learned."""

    Config: ClassVar[type[EncoderConfig]] = UniTransPoseConfig
    config: UniTransPoseConfig
    model: UniTransPose

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"widths": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window": 3}
        return {
            "type": "unitranspose",
            **sizes,
            "mlp_ratio": 2.0,
            "num_latents": 5,
            "image_size": [64, 96],
            "keep_prefix": True,
        }

    @classmethod
    def build(cls, config: UniTransPoseConfig) -> UniTransPose:
        for s, (width, heads) in enumerate(zip(config.widths, config.num_heads)):
            if width % heads:
                raise ConfigError(f"num_heads: {heads} of stage {s} do not divide its width {width}")
        if config.latents == "pooled" and math.isqrt(config.num_latents) ** 2 != config.num_latents:
            raise ConfigError(
                f"num_latents: pooled latents lie on a square, and {config.num_latents} is no square number"
            )
        if config.info is not None:
            require_multiple(config.info.image, 32, "every stage halves the map")
        needed = max(take_layers(config.layers, 4, lowest=1))
        return UniTransPose(config, needed, config.final_norm and needed == 4)

    def read_layers(self, pixels: Tensor) -> list[LayerOutput]:
        self.model.recompute = self.recompute
        outputs = self.model(pixels)
        chosen = [outputs[count - 1] for count in take_layers(self.config.layers, 4, lowest=1)]
        return [LayerOutput(x.flatten(1, 2), (x.shape[1], x.shape[2]), latents) for x, latents in chosen]

    def layer_groups(self) -> list[tuple[str, list[str]]]:
        """Blocks are the layers; what stands before a stage goes with its first block."""
        groups = [("embeddings", ["model.downsample.0.", "model.joint_tokens"])]
        for s, blocks in enumerate(self.model.stages):
            for i in range(len(blocks)):  # type: ignore[arg-type]
                before = [f"model.downsample.{s}.", f"model.widen.{s - 1}."] if s and i == 0 else []
                groups.append((f"layers.{len(groups) - 1}", [*before, f"model.stages.{s}.{i}."]))
        return [*groups, ("norm", ["model.norm."])] if self.model.norm is not None else groups
