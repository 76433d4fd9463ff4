"""How does one encoder's attention map steer what is read from it (FakeReasoning, arXiv 2503.21210)?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    shown,
    split_heads,
)
from mllm.errors import AlignmentError, ConfigError
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures


class BiasedCrossAttention(nn.Module):
    """Post-norm cross-attention and feed-forward; an attention map of the key side, through two 1×1 convolutions, is
    added to the logits."""

    def __init__(
        self, width: int, *, num_heads: int, map_heads: int, bias_hidden: int, mlp_hidden: int, dropout: float = 0.1
    ):
        super().__init__()
        self.num_heads = num_heads
        self.bias = nn.Sequential(nn.Conv2d(map_heads, bias_hidden, 1), nn.GELU(), nn.Conv2d(bias_hidden, num_heads, 1))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(mlp_hidden, width)
        )
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, source: Tensor, attention: Tensor) -> Tensor:
        """query, source ``(B, N, W)``; attention ``(B, heads, P + N, P + N)``, rows sum to 1, the P prefix tokens first
        → ``(B, N, W)``."""
        tokens = query.shape[1]
        cue = (attention[:, :, -tokens:, -tokens:].float() + 1e-6).log().to(query.dtype)
        q, k, v = (
            split_heads(layer(x), self.num_heads)
            for layer, x in ((self.query, query), (self.key, source), (self.value, source))
        )
        read = self.out(merge_heads(attend(q, k, v, mask=self.bias(cue))))
        x = self.attention_norm(query + self.dropout(read))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class AttentionBiasConfig(ConnectorConfig):
    """Two encoders on one grid: the first one's tokens ask, the second one's answer, steered by its own attention."""

    type: str = "attention_bias"
    query: str | None = None
    """Encoder whose tokens ask; default: the first."""
    source: str | None = None
    """Encoder whose tokens and last attention map are read; default: the other."""
    attention_heads: int = Field(default=16, ge=1)
    """Heads of the source encoder's attention map."""
    num_heads: int = Field(default=16, ge=1)
    bias_hidden: int = Field(default=32, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)

    def roles(self, encoders: Mapping[str, EncoderInfo]) -> tuple[str, str]:
        """Names of the asking and the answering encoder. Raises `ConfigError`."""
        return asking_and_answering("attention_bias", encoders, self.query, self.source)


@CONNECTORS.register("attention_bias")
class AttentionBiasConnector(Connector):
    """Two encoders → ``(B, N, L)``. Needs the source encoder's last attention map (`Connector.attention_from`)."""

    Config = AttentionBiasConfig
    config: AttentionBiasConfig

    def __init__(self, config: AttentionBiasConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        self.roles = config.roles(encoders)
        if width % config.num_heads:
            raise ConfigError(
                f"connector attention_bias: the language model's width {width} is not a multiple of num_heads "
                f"({config.num_heads}); set num_heads"
            )
        self.projectors = nn.ModuleDict(
            {name: build_projector(config.projector, self.encoders[name].width, width) for name in self.roles}
        )
        self.fusion = BiasedCrossAttention(
            width,
            num_heads=config.num_heads,
            map_heads=config.attention_heads,
            bias_hidden=config.bias_hidden,
            mlp_hidden=int(width * config.mlp_ratio),
            dropout=config.dropout,
        )
        self.reset_parameters()

    @classmethod
    def layout(cls, config: AttentionBiasConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        query, source = config.roles(encoders)
        grid, other = encoders[query].grid, encoders[source].grid
        if grid != other:
            raise ConfigError(
                f"connector attention_bias: encoder {query!r} has grid {shown(grid)} and {source!r} has "
                f"{shown(other)}; an attention map cannot be resampled, so give both the same grid through their "
                f"image sizes"
            )
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid)

    @classmethod
    def attention_from(cls, config: AttentionBiasConfig, encoders: Mapping[str, EncoderInfo]) -> dict[str, int]:
        return {config.roles(encoders)[1]: config.attention_heads}

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=8, width=12)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(2, 3), width=6),
            "spatial": EncoderInfo(image=image, grid=(2, 3), width=4, num_prefix_tokens=1),
        }
        config = {"type": "attention_bias", "attention_heads": 2, "num_heads": 4, "bias_hidden": 6, "mlp_ratio": 2.0}
        return config, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.fusion.mlp_norm]

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        source = self.roles[1]
        tokens = read_features(self.encoders, features, routing)
        attention = features[source].attention if source in features else None
        if attention is None:
            raise AlignmentError(
                f"attention_bias: features of encoder {source!r} carry no attention map; run it with "
                f"return_attention=True"
            )
        batch, count, _ = tokens[source].shape
        heads, size = self.config.attention_heads, attention.shape[-1]
        if tuple(attention.shape) != (batch, heads, size, size) or size < count:
            raise AlignmentError(
                f"attention_bias: attention map of encoder {source!r} has shape {tuple(attention.shape)}, expected "
                f"({batch}, {heads}, P + {count}, P + {count}); set attention_heads to the encoder's own number"
            )
        asking, answering = (self.projectors[name](tokens[name]) for name in self.roles)
        return self.fusion(asking, answering, attention)
