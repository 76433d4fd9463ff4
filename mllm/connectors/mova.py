"""How do a base encoder's tokens read the maps of routed experts (MoVA, arXiv 2404.13046)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    ProjectorConfig,
    at_least,
    attend,
    build_projector,
    expert_weight,
    known_encoder,
    merge_heads,
    read_features,
    resample,
    shown,
    split_heads,
)
from mllm.errors import AlignmentError, ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures

HEAD_WIDTH = 64


def rotary_table(grid: Grid, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(rows * cols, 64)`` in fp32: the first 32 channels turn with the row, the last 32 with the
    column; 16 frequencies ``10000^(-2k / 32)``, each on two neighbouring channels."""
    half = HEAD_WIDTH // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)

    def angles(cells: int) -> Tensor:
        positions = torch.arange(cells, dtype=torch.float32, device=device)
        return (positions[:, None] * frequencies).repeat_interleave(2, dim=-1)

    rows, cols = grid
    table = torch.cat(
        [angles(rows)[:, None, :].expand(-1, cols, -1), angles(cols)[None, :, :].expand(rows, -1, -1)], dim=-1
    ).flatten(0, 1)
    return table.cos(), table.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply `rotary_table` to ``(B, heads, N, 64)``: neighbouring channels (a, b) turn towards (-b, a); in fp32."""
    cos, sin = table
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


class MapAttention(nn.Module):
    """Attention of one map on another of the same grid: heads of 64, rotary positions, a norm before the last layer."""

    def __init__(self, width: int, value_width: int):
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(value_width, width, bias=False)
        self.value = nn.Linear(value_width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, value: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x ``(B, N, W)``, value ``(B, N, C)`` → ``(B, N, W)``."""
        q = rotate(split_heads(self.query(x), self.num_heads), table)
        k = rotate(split_heads(self.key(value), self.num_heads), table)
        v = split_heads(self.value(value), self.num_heads)
        return self.out(self.norm(merge_heads(attend(q, k, v))))


class GatedMlp(nn.Module):
    """SwiGLU with a norm on the hidden product: ``out(norm(silu(gate x) * value x))``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(F.silu(self.gate(x)) * self.value(x)))


class AdapterBlock(nn.Module):
    """Gated cross-attention on the routed experts, self-attention, gated MLP; all residual."""

    def __init__(self, width: int, expert_widths: Sequence[int], *, text_width: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Sequential(nn.Linear(text_width + width, width), nn.GELU(), nn.Linear(width, len(expert_widths)))
        self.query_norms = nn.ModuleList(nn.LayerNorm(width) for _ in expert_widths)
        self.expert_norms = nn.ModuleList(nn.LayerNorm(c) for c in expert_widths)
        self.readers = nn.ModuleList(MapAttention(width, c) for c in expert_widths)
        self.attention_norm, self.attention = nn.LayerNorm(width), MapAttention(width, width)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), GatedMlp(width, int(width * 8 / 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.gate[-1], self.attention.out, self.mlp.out, *(reader.out for reader in self.readers)):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, experts: Sequence[Tensor], text: Tensor, present: Tensor, table: Any) -> Tensor:
        """x ``(B, N, W)``, experts ``(B, N, C)`` each on x's grid, text ``(B, T)``, present ``(B, E)`` 1 where the
        expert may be read → ``(B, N, W)``. An expert is computed on the images that use it only, at any batch size."""
        logits = self.gate(torch.cat([text, x.mean(dim=1)], dim=-1))
        shares = (logits.float() + (1 - (present > 0).float()) * -1e6).softmax(-1)
        top, index = shares.topk(self.top_k, dim=-1)
        shares = torch.zeros_like(shares).scatter(-1, index, top / top.sum(-1, keepdim=True)) * present
        read = torch.zeros_like(x)
        used = (shares > 0).detach().cpu()  # one transfer per block, not one per expert
        for i, tokens in enumerate(experts):
            rows = used[:, i].nonzero().flatten()
            # While gradients are recorded an unused expert still runs, on no rows: its parameters get zero gradients
            # instead of none, which data-parallel engines need to agree between ranks.
            if len(rows) == 0 and not torch.is_grad_enabled():
                continue
            if len(rows) == len(x):
                read = read + shares[:, i, None, None].to(x.dtype) * self._read(i, x, tokens, table)
                continue
            rows = rows.to(x.device)
            update = shares[rows, i, None, None].to(x.dtype) * self._read(i, x[rows], tokens[rows], table)
            read = read.index_add(0, rows, update)
        x = x + read
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, table)
        return x + self.mlp(self.mlp_norm(x))

    def _read(self, i: int, x: Tensor, tokens: Tensor, table: Any) -> Tensor:
        return self.readers[i](self.query_norms[i](x), self.expert_norms[i](tokens), table)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a ``(B, C, H, W)`` map."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)  # eps 1e-5: timm's norm-act layers, which the published stages use

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStage(nn.Module):
    """One RegNet bottleneck: 1×1, 3×3 depthwise, squeeze-and-excitation, 1×1, residual, linear output."""

    def __init__(self, width: int):
        super().__init__()
        squeezed = max(1, round(width * 0.25))
        self.conv_1, self.norm_1 = nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)
        self.conv_2, self.norm_2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), ChannelNorm(width)
        self.squeeze, self.excite = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)
        self.conv_3, self.norm_3 = nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.norm_3.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm_1(self.conv_1(x)))
        y = F.silu(self.norm_2(self.conv_2(y)))
        y = y * self.excite(F.silu(self.squeeze(y.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        return x + self.norm_3(self.conv_3(y))


class MovaConfig(ConnectorConfig):
    """MoVA's adapter. Every encoder but ``base`` is an expert; all maps are brought to the base encoder's grid."""

    type: str = "mova"
    base: str | None = None
    """The encoder that always runs; default: the first one. Its width must be a multiple of 64 (heads of 64)."""
    depth: int = Field(default=3, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    """Most experts read per image and block; default 3, or all when there are fewer."""
    text_width: int | None = Field(default=None, ge=1)
    """Channels of the question's summary; default: the language model's width."""
    output_grid: Grid | None = None
    """Rows and columns of the result; default: half the base encoder's grid."""

    def split(self, encoders: Mapping[str, EncoderInfo]) -> tuple[str, list[str]]:
        """The base encoder's name and the experts' names. Raises `ConfigError`."""
        at_least("connector mova", encoders, 2)
        base = known_encoder("connector mova: base", self.base or next(iter(encoders)), encoders)
        return base, [name for name in encoders if name != base]


@CONNECTORS.register("mova")
class MovaConnector(Connector):
    """A base encoder and E experts → ``(B, base grid / 2, L)``. At initialisation it equals MLP(2×2 average of the base
    tokens) for any routing. Encoders that the routing does not name are always read."""

    Config = MovaConfig
    config: MovaConfig
    uses_routing = True

    def __init__(self, config: MovaConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.output_grid = self.layout(config, encoders).grid
        self.base, self.experts = config.split(encoders)
        self.grid, base_width = self.encoders[self.base].grid, self.encoders[self.base].width
        self.text_width = config.text_width or width
        self.positions = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], base_width))
        widths = [self.encoders[name].width for name in self.experts]
        top_k = config.top_k or min(3, len(self.experts))
        self.blocks = nn.ModuleList(
            AdapterBlock(base_width, widths, text_width=self.text_width, top_k=top_k) for _ in range(config.depth)
        )
        self.stages = nn.ModuleList([ConvStage(base_width), ConvStage(base_width)])
        self.projector = build_projector(ProjectorConfig(depth=2), base_width, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: MovaConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        base, experts = config.split(encoders)
        grid, width = encoders[base].grid, encoders[base].width
        if width % HEAD_WIDTH:
            raise ConfigError(
                f"connector mova: base encoder {base!r} has width {width}, not a multiple of {HEAD_WIDTH} (heads of "
                f"64); set base to another encoder"
            )
        if config.top_k is not None and config.top_k > len(experts):
            raise ConfigError(
                f"connector mova: top_k is {config.top_k}, but there are {len(experts)} experts: {experts}"
            )
        if config.output_grid is None and (grid[0] % 2 or grid[1] % 2):
            raise ConfigError(
                f"connector mova: base encoder {base!r} has grid {shown(grid)}, which cannot be halved to "
                f"{grid[0] / 2:g}×{grid[1] / 2:g}; set output_grid: [rows, columns], or give it an image size with an "
                f"even grid"
            )
        output = config.output_grid or (grid[0] // 2, grid[1] // 2)
        if output[0] > grid[0] or output[1] > grid[1] or min(output) < 1:
            raise ConfigError(
                f"connector mova: base encoder {base!r} has grid {shown(grid)}, which cannot be averaged to "
                f"output_grid {shown(output)}; choose one from 1×1 to {shown(grid)}"
            )
        return ViewLayout(num_tokens=output[0] * output[1], grid=output)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "base": EncoderInfo(image=image, grid=(2, 4), width=64),
            "spatial": EncoderInfo(image=image, grid=(3, 3), width=12),
            "text": EncoderInfo(image=image, grid=(4, 4), width=10),
        }
        return {"type": "mova", "depth": 1}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.positions)

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        tokens = read_features(self.encoders, features, routing)
        base = tokens[self.base]
        batch = base.shape[0]
        text = base.new_zeros(batch, self.text_width) if text is None else text.to(base.dtype)
        if tuple(text.shape) != (batch, self.text_width):
            raise AlignmentError(f"mova: text has shape {tuple(text.shape)}, expected {(batch, self.text_width)}")
        maps = [resample(tokens[name], self.encoders[name].grid, self.grid) for name in self.experts]
        weights = (expert_weight(routing, name, select=True) for name in self.experts)
        present = torch.stack([base.new_ones(batch) if w is None else w for w in weights], dim=-1).float()
        table = rotary_table(self.grid, device=base.device)
        x = base + self.positions
        for block in self.blocks:
            x = block(x, maps, text, present, table)
        image = ((x + base) / 2).transpose(1, 2).unflatten(-1, self.grid)
        image = self.stages[1](F.adaptive_avg_pool2d(self.stages[0](image), self.output_grid))
        return self.projector(image.flatten(2).transpose(1, 2).contiguous())
