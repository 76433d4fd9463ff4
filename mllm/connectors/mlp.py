"""How do one encoder's tokens become visual tokens, one to one?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import ProjectorConfig, build_projector, read_features, single
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures


class LinearConfig(ConnectorConfig):
    """One linear layer."""

    type: str = "linear"
    bias: bool = True


class MlpConfig(ConnectorConfig, ProjectorConfig):
    """An MLP; ``{type: mlp, depth: 2}`` is LLaVA-1.5's ``mlp2x_gelu`` (arXiv 2310.03744)."""

    type: str = "mlp"


class MlpConnector(Connector):
    """One encoder, token by token: ``(B, N, D)`` → ``(B, N, L)``."""

    Config = MlpConfig
    config: MlpConfig

    def __init__(self, config: MlpConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        self.projector = build_projector(self.projector_config(), self.encoders[next(iter(encoders))].width, width)
        self.reset_parameters()

    def projector_config(self) -> ProjectorConfig:
        return self.config

    @classmethod
    def layout(cls, config: MlpConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        info = encoders[single(f"connector {config.type}", encoders)]
        return ViewLayout(
            num_tokens=info.num_tokens, grid=info.grid, row_separators=info.row_ends, leading=info.leading
        )

    @classmethod
    def native_cell(cls, config: MlpConfig) -> int | None:
        return 1

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        return (
            {"type": cls.name},
            {"vision": EncoderInfo(image=ImageSpec(height=8, width=12), grid=(2, 3), width=10)},
            8,
        )

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        (tokens,) = read_features(self.encoders, features, routing).values()
        return self.projector(tokens)


class LinearConnector(MlpConnector):
    """One linear layer per token: ``(B, N, D)`` → ``(B, N, L)``."""

    Config = LinearConfig
    config: LinearConfig

    def projector_config(self) -> ProjectorConfig:
        return ProjectorConfig(depth=1, bias=self.config.bias)


CONNECTORS.register("mlp")(MlpConnector)
CONNECTORS.register("linear")(LinearConnector)
