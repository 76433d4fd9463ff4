"""What does BiFormer see: attention to the few regions that matter to a region (arXiv 2303.08810)?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders.backbones.base import BackboneConfig, Pyramid, PyramidEncoder, require_multiple
from mllm.encoders.backbones.layers import DepthwiseConv, Mlp, drop, drop_rates, init_linear
from mllm.encoders.base import EncoderConfig
from mllm.errors import ConfigError

Four = tuple[int, int, int, int]


class BiFormerConfig(BackboneConfig):
    """BiFormer; defaults are BiFormer-T."""

    variant: Literal["biformer", "stl", "stl_nchw"] = "biformer"
    """stl: Swin-T's layout (stem 4 × 4, no position convolutions). stl_nchw: the authors' second version of it, whose
    weights and treatment of odd sizes are others."""
    widths: Four = (64, 128, 256, 512)
    depths: Four = (2, 2, 8, 2)
    top_k: tuple[int, int, int] = (1, 4, 16)
    """Regions that a region attends to, in the three routed stages; the fourth attends to everything."""
    num_regions: int | tuple[int, int, int] = 7
    """Regions per side of a map (the authors' n_win), of all routed stages or each. Not in the weights: raise it with
    the image (8 for 512 pixels)."""
    head_width: int = Field(default=32, gt=0)
    """Of the routed stages; the fourth always has 8 heads."""
    mlp_ratio: float = Field(default=3.0, gt=0)
    auto_pad: bool = False
    """Take maps that the regions do not divide, padded as the authors pad them (unmasked)."""

    @property
    def regions(self) -> tuple[int, int, int]:
        n = self.num_regions
        return (n, n, n) if isinstance(n, int) else n


def choose_regions(queries: Tensor, keys: Tensor, top_k: int) -> Tensor:
    """Means of regions ``(B, R, C)`` → ids ``(B, R, top_k)`` of the regions most related to each; no gradient."""
    with torch.no_grad():
        return (queries.float() @ keys.float().transpose(1, 2)).topk(top_k, dim=-1).indices


class RoutedAttention(nn.Module):
    """Pixels of a region attend to all pixels of the ``top_k`` regions most related to it; a depthwise convolution of
    the values is added. Maps ``(B, rows, cols, C)``."""

    def __init__(self, width: int, config: BiFormerConfig, stage: int):
        super().__init__()
        self.num_heads = width // config.head_width
        self.top_k, self.per_side = config.top_k[stage], config.regions[stage]
        self.pads_late = config.variant == "stl_nchw"
        self.qkv = nn.Linear(width, 3 * width)
        self.local = DepthwiseConv(width, 5)
        self.wo = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, cols = x.shape[1:3]
        if self.pads_late:
            side = (rows // self.per_side, cols // self.per_side)
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            local = self.local(v)
            related = choose_regions(_means(q, side), _means(k, side), self.top_k)
            q, k, v = (_pad(part, side) for part in (q, k, v))
        else:
            x = _pad(x, (self.per_side, self.per_side))
            side = (x.shape[1] // self.per_side, x.shape[2] // self.per_side)
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            local = self.local(v)[:, :rows, :cols]
            related = choose_regions(_means(q, side), _means(k, side), self.top_k)
        return self.wo(self.attend(q, k, v, side, related)[:, :rows, :cols] + local)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, side: tuple[int, int], chosen: Tensor) -> Tensor:
        """chosen ``(B, R, top_k)``: region ids, row by row."""
        batch, rows, cols, width = q.shape
        grid = (rows // side[0], cols // side[1])
        image = torch.arange(batch, device=q.device)[:, None, None]
        q = _regions(q, side).flatten(0, 1)
        k, v = (_regions(part, side)[image, chosen].flatten(2, 3).flatten(0, 1) for part in (k, v))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        # Scaled by the whole width, not by the head's.
        y = F.scaled_dot_product_attention(q, k, v, scale=width**-0.5).transpose(1, 2).flatten(-2)
        return y.reshape(batch, *grid, *side, width).transpose(2, 3).reshape(batch, rows, cols, width)


class FullAttention(nn.Module):
    """Attention of everything to everything, with a depthwise convolution of its input (or of the values) added."""

    num_heads = 8

    def __init__(self, width: int, *, local_on_values: bool):
        super().__init__()
        self.local_on_values = local_on_values
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.local = DepthwiseConv(width, 5)
        self.wo = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        local = self.local(v if self.local_on_values else x)
        q, k, v = (part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.wo(y + local)


def _pad(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Zeros at the right and at the bottom."""
    down, right = -x.shape[1] % multiple[0], -x.shape[2] % multiple[1]
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x


def _regions(x: Tensor, side: tuple[int, int]) -> Tensor:
    """``(B, rows, cols, C)`` → ``(B, R, pixels of a region, C)``, regions and pixels row by row."""
    batch, rows, cols, width = x.shape
    x = x.reshape(batch, rows // side[0], side[0], cols // side[1], side[1], width).transpose(2, 3)
    return x.reshape(batch, -1, side[0] * side[1], width)


def _means(x: Tensor, side: tuple[int, int]) -> Tensor:
    """Means of regions ``(B, R, C)`` in fp32; regions at the border may be smaller."""
    x = x.permute(0, 3, 1, 2).float()
    return F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """``(B, rows, cols, C)`` to the same shape."""

    def __init__(self, config: BiFormerConfig, stage: int, rate: float):
        super().__init__()
        width = config.widths[stage]
        if config.variant == "biformer":
            self.pos_embed = DepthwiseConv(width, 3)
        self.has_position = config.variant == "biformer"
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = (
            RoutedAttention(width, config, stage)
            if stage < 3
            else FullAttention(width, local_on_values=config.variant == "stl_nchw")
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(config.mlp_ratio * width))
        self.drop_path = drop(rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_position:
            x = x + self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Entry(nn.Sequential):
    """Convolutions and batch norms before a stage; maps come and go with channels last (pixels come first)."""

    def __init__(self, *layers: nn.Module, of_pixels: bool):
        super().__init__(*layers)
        self.of_pixels = of_pixels

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.of_pixels else input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LastNorm(nn.BatchNorm2d):
    """Batch norm of a map whose channels come last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BiFormer(Pyramid):
    """Pixels to the maps of BiFormer's stages; names are the authors' but for the attention and the MLP."""

    def __init__(self, config: BiFormerConfig, num_stages: int, last_norm: bool):
        super().__init__()
        self.num_stages, widths = num_stages, config.widths
        self.downsample_layers = nn.ModuleList(_entry(config, stage) for stage in range(num_stages))
        rates = iter(drop_rates(config.drop_path, sum(config.depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(config, stage, next(rates)) for _ in range(config.depths[stage]))
            for stage in range(num_stages)
        )
        self.norm = LastNorm(widths[3]) if last_norm else None
        self.apply(init_linear)

    def entry(self, stage: int) -> nn.Module:
        return self.downsample_layers[stage]

    def blocks(self, stage: int) -> Sequence[nn.Module]:
        return self.stages[stage]  # type: ignore[return-value]


def _entry(config: BiFormerConfig, stage: int) -> Entry:
    width, before = config.widths[stage], config.widths[stage - 1] if stage else 3
    if config.variant == "biformer":
        layers: list[nn.Module] = [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)]
        if stage == 0:
            half = width // 2
            first = [nn.Conv2d(3, half, 3, stride=2, padding=1), nn.BatchNorm2d(half), nn.GELU()]
            layers = [*first, nn.Conv2d(half, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)]
    elif stage == 0:
        layers = [nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width)]
    else:
        layers = [nn.BatchNorm2d(before), nn.Conv2d(before, width, 2, stride=2)]
    return Entry(*layers, of_pixels=stage == 0)


class BiFormerEncoder(PyramidEncoder):
    """BiFormer and its STL versions: stride 32 in the last stage, 16 in the one before."""

    Config: ClassVar[type[EncoderConfig]] = BiFormerConfig
    config: BiFormerConfig

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "type": "biformer",
            "widths": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "top_k": [1, 2, 4],
            "num_regions": 2,
            "head_width": 8,
            "image_size": [64, 96],
            "layers": [-1, -2],
        }

    @classmethod
    def build(cls, config: BiFormerConfig) -> BiFormer:
        check(config)
        return BiFormer(config, *cls.stages_needed(config))

    @classmethod
    def translate(cls, state: dict[str, Tensor], config: BiFormerConfig) -> dict[str, Tensor]:
        return {_own_name(key): _as_linear(key, value) for key, value in state.items()}


def check(config: BiFormerConfig) -> None:
    """Raise `ConfigError` for widths that heads do not divide and sizes that regions do not."""
    for stage, width in enumerate(config.widths):
        heads = 8 if stage == 3 else max(width // config.head_width, 1)
        if width % heads or (stage < 3 and width % config.head_width):
            what = "its 8 heads" if stage == 3 else f"head_width {config.head_width}"
            raise ConfigError(f"widths: {width} of stage {stage} is not divided by {what}")
    for stage, (count, per_side) in enumerate(zip(config.top_k, config.regions)):
        if not 1 <= count <= per_side**2:
            raise ConfigError(f"top_k: {count} of stage {stage} is outside 1 to {per_side**2}, its number of regions")
    if config.info is None:
        return
    image, late = config.info.image, config.variant == "stl_nchw"
    if not (config.auto_pad or late):
        for stage, per_side in enumerate(config.regions):
            hint = "set auto_pad: true to take any size, or choose another num_regions"
            require_multiple(image, (4 << stage) * per_side, f"num_regions {per_side} of stage {stage}; {hint}")
    smallest = max((4 << stage) * per_side for stage, per_side in enumerate(config.regions)) if late else 32
    if min(image.height, image.width) < smallest:
        raise ConfigError(f"image_size: {image.height} x {image.width} is too small; both sides at least {smallest}")


_NAMES = (
    (r"(^|\.)(stages\.\d+)\.blocks\.(\d+)\.", r"\1\2.\3."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(proj|output_linear)\.", ".attn.wo."),
    (r"\.attn\.lepe\.", ".attn.local."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
)


def _own_name(key: str) -> str:
    for pattern, own in _NAMES:
        key = re.sub(pattern, own, key)
    return key


def _as_linear(key: str, value: Tensor) -> Tensor:
    """1 × 1 convolutions of the attention and the MLP are linear layers here."""
    is_conv = re.search(r"\.(qkv|qkv_linear|output_linear|proj|wo|mlp\.\w+)\.weight$", key) and value.ndim == 4
    return value.flatten(1) if is_conv else value
