"""How do a transformer's and convolutional networks' maps of one picture become one (DB-SAM, arXiv 2410.04172)?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    ProjectorConfig,
    at_least,
    build_projector,
    known_encoder,
    read_features,
    resample,
)
from mllm.errors import ConfigError
from mllm.fusions import GateFusion, SoftmaxFusion
from mllm.types import EncoderInfo, ImageSpec, Routing, ViewLayout, VisionFeatures


class BranchFusionConfig(ConnectorConfig):
    """A ViT and one or more convolutional encoders on one grid, weighed against one another position by position."""

    type: str = "branch_fusion"
    vit: str | None = None
    """The transformer's name; default: the first encoder. All others are branches of convolutions."""
    fusion: Literal["softmax", "gate"] = "softmax"
    """softmax: every branch scores every position and channel, the scores compete (DB-SAM's fusion of several maps). gate: one share for
    the convolutions, the rest for the ViT (its fusion of two)."""
    width: int = Field(default=256, ge=1)
    """Channels in which the branches meet; an encoder of another width gets there by a linear layer."""
    reduction: int = Field(default=16, ge=1)
    """The scorers' inner width is ``width / reduction``."""
    expand: float = Field(default=4.0, gt=0)
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)


@CONNECTORS.register("branch_fusion")
class BranchFusionConnector(Connector):
    """Encoders → ``(B, rows * cols, L)`` on the ViT's grid."""

    Config = BranchFusionConfig
    config: BranchFusionConfig

    def __init__(self, config: BranchFusionConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.grid = self.layout(config, encoders).grid
        self.vit = config.vit or next(iter(encoders))
        self.convs = [name for name in encoders if name != self.vit]
        self.inner = nn.ModuleDict(
            {
                name: nn.Identity() if info.width == config.width else nn.Linear(info.width, config.width)
                for name, info in encoders.items()
            }
        )
        if config.fusion == "gate":
            self.fusion: nn.Module = GateFusion(config.width, config.reduction, config.expand)
        else:
            self.fusion = SoftmaxFusion(config.width, len(self.convs), config.reduction, config.expand)
        self.projector = build_projector(config.projector, config.width, width)
        self.reset_parameters()

    @classmethod
    def layout(cls, config: BranchFusionConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        where = "connector branch_fusion"
        at_least(where, encoders, 2)
        vit = known_encoder(f"{where}: vit", config.vit, encoders) if config.vit else next(iter(encoders))
        if config.width % config.reduction:
            raise ConfigError(f"{where}: width {config.width} is not divisible by reduction {config.reduction}")
        if config.fusion == "gate" and len(encoders) != 2:
            raise ConfigError(f"{where}: fusion gate joins two encoders, this model has {len(encoders)}; use softmax")
        grid = encoders[vit].grid
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "vit": EncoderInfo(image=image, grid=(4, 4), width=8),
            "conv": EncoderInfo(image=image, grid=(8, 8), width=6),
            "deep": EncoderInfo(image=image, grid=(2, 2), width=10),
        }
        return {"type": "branch_fusion", "width": 8, "reduction": 2, "expand": 2.0}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [self.projector[-1]]

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        found = {
            name: self.inner[name](resample(tokens, self.encoders[name].grid, self.grid, "bilinear"))
            for name, tokens in read_features(self.encoders, features, routing).items()
        }
        return self.projector(self.fusion(found[self.vit], [found[name] for name in self.convs]))
