"""How does a picture's global view read its local one, as far as a gate lets it (FOCUS, arXiv 2506.16806)?

FOCUS has no public code: its paper says that global tokens ask, local ones answer, and a learned gate decides how much of the answer is
added. Norms, heads and the gate's form are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    ProjectorConfig,
    asking_and_answering,
    attend,
    build_projector,
    merge_heads,
    read_features,
    split_heads,
)
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures


class GatedCrossBlock(nn.Module):
    """``x + tanh(gate) · attention(x, source)``, then the same with a feed-forward; gates of zero change nothing."""

    def __init__(self, width: int, source_width: int, *, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        hidden = int(width * mlp_ratio)
        self.norm, self.source_norm, self.mlp_norm = (
            nn.LayerNorm(width),
            nn.LayerNorm(source_width),
            nn.LayerNorm(width),
        )
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(source_width, width), nn.Linear(source_width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.gates = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x ``(B, N, W)``; source ``(B, S, V)`` → ``(B, N, W)``."""
        source = self.source_norm(source)
        q, k, v = (
            split_heads(part, self.num_heads)
            for part in (self.query(self.norm(x)), self.key(source), self.value(source))
        )
        gates = torch.tanh(self.gates)
        x = x + gates[0] * self.out(merge_heads(attend(q, k, v)))
        return x + gates[1] * self.mlp(self.mlp_norm(x))


class GatedCrossConfig(ConnectorConfig):
    """Two encoders on any grids: the first one's tokens ask, the second one's answer."""

    type: Literal["gated_cross"] = "gated_cross"
    query: str | None = None
    """Encoder whose tokens ask and stay; default: the first."""
    source: str | None = None
    """Encoder whose tokens answer; default: the other."""
    depth: int = Field(default=1, ge=1)
    """Blocks, each with gates of its own."""
    num_heads: int = Field(default=16, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    gate: float = Field(default=0.0)
    """What the gates begin with, before tanh. 0: the model begins as one of the asking encoder alone."""
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)

    def roles(self, encoders: Mapping[str, EncoderInfo]) -> tuple[str, str]:
        """Names of the asking and the answering encoder. Raises `ConfigError`."""
        return asking_and_answering("gated_cross", encoders, self.query, self.source)


@CONNECTORS.register("gated_cross")
class GatedCrossConnector(Connector):
    """Two encoders → ``(B, N, L)``, N the asking encoder's tokens."""

    Config = GatedCrossConfig
    config: GatedCrossConfig

    def __init__(self, config: GatedCrossConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.roles = config.roles(encoders)
        asking, answering = (self.encoders[name].width for name in self.roles)
        if asking % config.num_heads:
            raise ConfigError(
                f"connector gated_cross: encoder {self.roles[0]!r} is {asking} wide, no multiple of num_heads ({config.num_heads}); "
                "set num_heads"
            )
        self.blocks = nn.ModuleList(
            GatedCrossBlock(asking, answering, num_heads=config.num_heads, mlp_ratio=config.mlp_ratio)
            for _ in range(config.depth)
        )
        self.projector = build_projector(config.projector, asking, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As every connector's; gates begin where the config says."""
        super().reset_parameters()
        for block in self.blocks:
            assert isinstance(block, GatedCrossBlock)
            nn.init.constant_(block.gates, self.config.gate)

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    @classmethod
    def layout(cls, config: GatedCrossConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        rows, columns = encoders[config.roles(encoders)[0]].grid
        return ViewLayout(num_tokens=rows * columns, grid=(rows, columns))

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=8, width=12)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(2, 3), width=8),
            "detail": EncoderInfo(image=image, grid=(4, 6), width=6),
        }
        return {"type": "gated_cross", "num_heads": 2, "mlp_ratio": 2.0, "gate": 0.5}, encoders, 10

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        tokens = read_features(self.encoders, features, routing)
        x, source = (tokens[name] for name in self.roles)
        for block in self.blocks:
            x = block(x, source)
        return self.projector(x)
