"""What does VSSD see: one state gathered from the whole map, read by every place (arXiv 2407.18559)?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, Pyramid, PyramidEncoder
from mllm.encoders.backbones.layers import DepthwiseConv, Mlp, SelfAttention, drop, drop_rates, init_linear
from mllm.encoders.base import EncoderConfig
from mllm.encoders.library import take_layers
from mllm.errors import ConfigError

Four = tuple[int, int, int, int]


class VssdConfig(BackboneConfig):
    """VSSD; defaults are VSSD-T."""

    width: int = Field(default=64, ge=2)
    """C of the first stage; doubles from stage to stage."""
    depths: Four = (2, 4, 8, 4)
    num_heads: Four = (2, 4, 8, 16)
    state: int = Field(default=64, gt=0)
    """Rows of the state that one head gathers."""
    expansion: int = Field(default=2, gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    stage_norms: bool = False
    """A norm of its own on what is read of every stage, in place of the last one, as in the authors' dense class. Norms
    that the weights do not hold start neutral."""


class StateSpaceMixer(nn.Module):
    """Mamba-2's duality without an order: every token adds to one state per head, every token reads it. Linear in the
    number of tokens; the state is not divided by it, so features shift a little with the image's size."""

    def __init__(self, width: int, num_heads: int, state: int, expansion: int):
        super().__init__()
        inner = expansion * width
        self.num_heads, self.split = num_heads, (inner, state, state)
        self.in_proj = nn.Linear(width, 2 * inner + 2 * state + num_heads, bias=False)
        self.conv2d = DepthwiseConv(inner + 2 * state, 3)
        step = torch.exp(torch.rand(num_heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, rows, cols, C)`` to the same shape."""
        inner, state, _ = self.split
        gate, mixed, step = self.in_proj(x).split((inner, inner + 2 * state, self.num_heads), dim=-1)
        values, write, read = F.silu(self.conv2d(mixed)).flatten(1, 2).split(self.split, dim=-1)
        step = F.softplus(step.float() + self.dt_bias.float()).flatten(1, 2)
        values = values.unflatten(-1, (self.num_heads, -1))
        y = self.mix(values, write, read, step * self.A_log.float().exp()) + self.D[:, None] * values
        return self.out_proj(self.norm(y.flatten(-2)).reshape(gate.shape) * gate)

    def mix(self, values: Tensor, write: Tensor, read: Tensor, weights: Tensor) -> Tensor:
        """values ``(B, N, heads, P)``, write and read ``(B, N, state)``, weights ``(B, N, heads)`` → ``(B, N, heads,
        P)``. The sum over tokens is in fp32."""
        weighted = (values.float() * weights[..., None]).flatten(-2)
        gathered = write.float().transpose(1, 2) @ weighted
        return (read.float() @ gathered).unflatten(-1, values.shape[-2:]).to(values.dtype)


class MapAttention(SelfAttention):
    """Attention of every place to every place of a map ``(B, rows, cols, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).reshape(x.shape)


class Block(nn.Module):
    """``(B, rows, cols, C)`` to the same shape."""

    def __init__(self, config: VssdConfig, stage: int, rate: float):
        super().__init__()
        width, heads = config.width << stage, config.num_heads[stage]
        self.cpe1 = DepthwiseConv(width, 3)
        self.norm1 = nn.LayerNorm(width)
        self.attn = (
            MapAttention(width, heads, bias=False)
            if stage == 3
            else StateSpaceMixer(width, heads, config.state, config.expansion)
        )
        self.cpe2 = DepthwiseConv(width, 3)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = drop(rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Conv(nn.Module):
    """Convolution, batch norm where ``norm``, ReLU where ``relu``; channels first."""

    def __init__(
        self,
        before: int,
        width: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        relu: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(before, width, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class Stem(nn.Module):
    """Pixels ``(B, 3, H, W)`` → ``(B, H / 4, W / 4, C)``, rounded up."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1 = Conv(3, half, 3, stride=2)
        self.conv2 = nn.Sequential(Conv(half, half, 3), Conv(half, half, 3, relu=False))
        self.conv3 = nn.Sequential(Conv(half, 4 * width, 3, stride=2), Conv(4 * width, width, 1, relu=False))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels)
        return self.conv3(x + self.conv2(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """``(B, rows, cols, C)`` → half the rows and columns, rounded up, and 2 C."""

    def __init__(self, width: int):
        super().__init__()
        wide = 8 * width
        self.conv = nn.Sequential(
            Conv(width, wide, 1, bias=True, norm=False),
            Conv(wide, wide, 3, stride=2, groups=wide, bias=True, norm=False),
            Conv(wide, 2 * width, 1, bias=True, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Vssd(Pyramid):
    """Pixels to the maps of VSSD's stages, under the authors' names but for the last stage's attention."""

    def __init__(self, config: VssdConfig, num_stages: int, last_norm: bool):
        super().__init__()
        self.num_stages = num_stages
        self.patch_embed = Stem(config.width)
        rates = iter(drop_rates(config.drop_path, sum(config.depths)))
        self.layers = nn.ModuleList()
        for stage in range(num_stages):
            blocks = nn.ModuleList(Block(config, stage, next(rates)) for _ in range(config.depths[stage]))
            parts: dict[str, nn.Module] = {"blocks": blocks}
            if stage + 1 < num_stages:
                parts["downsample"] = Downsample(config.width << stage)
            self.layers.append(nn.ModuleDict(parts))
        self.norm = nn.LayerNorm(config.width << 3) if last_norm and not config.stage_norms else None
        if config.stage_norms:
            for stage in {count - 1 for count in take_layers(config.layers, 4, lowest=1)}:
                self.add_module(f"outnorm{stage}", nn.LayerNorm(config.width << stage))
        self.apply(init_linear)

    def entry(self, stage: int) -> nn.Module:
        return self.patch_embed if stage == 0 else self.layers[stage - 1]["downsample"]  # type: ignore[index]

    def blocks(self, stage: int) -> Sequence[nn.Module]:
        return self.layers[stage]["blocks"]  # type: ignore[index]

    def output(self, stage: int, x: Tensor) -> Tensor:
        norm = getattr(self, f"outnorm{stage}", None)
        return x if norm is None else norm(x)


class VssdEncoder(PyramidEncoder):
    """VSSD at any size; sides are halved and rounded up, as in the authors' dense class."""

    Config: ClassVar[type[EncoderConfig]] = VssdConfig
    config: VssdConfig

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "vssd",
            "width": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "state": 8,
            "image_size": [56, 70],
            "layers": [-1, -2],
        }

    @classmethod
    def build(cls, config: VssdConfig) -> Vssd:
        for stage, heads in enumerate(config.num_heads):
            inner = (config.width << stage) * (1 if stage == 3 else config.expansion)
            if inner % heads:
                raise ConfigError(f"num_heads: {heads} of stage {stage} do not divide width {inner}")
        if config.width % 2:
            raise ConfigError(f"width: {config.width} is odd, but the stem starts with half of it")
        return Vssd(config, *cls.stages_needed(config))

    @classmethod
    def published_names(cls, config: VssdConfig) -> set[str]:
        """A classifier's last norm, and the norms that the dense class adds to its outputs."""
        norms = {f"outnorm{stage}.{kind}" for stage in range(4) for kind in ("weight", "bias")}
        return super().published_names(config.model_copy(update={"stage_norms": False})) | norms

    @classmethod
    def absent(cls, state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        added = {k: v for k, v in own.items() if k.startswith("outnorm")}
        if any(key in state for key in added):
            added = {}
        fill = {"weight": torch.ones, "bias": torch.zeros}
        norms = {k: fill[k.rpartition(".")[2]](v.shape, dtype=v.dtype) for k, v in added.items()}
        return norms | super().absent(state, own)

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: VssdConfig) -> dict[str, Tensor]:
        return {k.replace(".to_qkv.", ".qkv.").replace(".to_out.", ".proj."): v for k, v in state.items()}
