"""How are several encoders joined along the token sequence, one after the other or in turns?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.layers import (
    Interpolation,
    ProjectorConfig,
    at_least,
    build_projector,
    check_grid,
    expert_weight,
    read_features,
    resample,
    resampled_width,
    weigh,
)
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures


class SequenceConcatConfig(ConnectorConfig):
    """One projector per encoder; all tokens of the first encoder, then all of the second."""

    type: str = "sequence_concat"
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    grid: Grid | None = None
    """Bring every encoder to this grid; default: each keeps its own."""
    interpolation: Interpolation = "bilinear"
    weighting: Literal["scale", "select"] = "scale"
    """What an expert's weight does to its projected tokens. scale: multiplies them. select: 1 where it runs, 0
    elsewhere."""


class InterleaveConfig(SequenceConcatConfig):
    """One projector per encoder; tokens taken in turns, position by position (LEO, arXiv 2501.06986)."""

    type: str = "interleave"
    interpolation: Interpolation = "none"
    """none: all grids must be equal; any other: encoders are brought to ``grid`` (default the first encoder's)."""


@CONNECTORS.register("sequence_concat")
class SequenceConcatConnector(Connector):
    """E encoders → ``(B, N_1 + … + N_E, L)``. An absent expert's tokens are zero vectors; the length never changes."""

    Config = SequenceConcatConfig
    config: SequenceConcatConfig
    uses_routing = True

    def __init__(self, config: SequenceConcatConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        self.grids = self.target_grids(config, encoders)
        self.projectors = nn.ModuleDict(
            {
                name: build_projector(
                    config.projector,
                    resampled_width(info.width, info.grid, self.grids[name], config.interpolation),
                    width,
                )
                for name, info in self.encoders.items()
            }
        )
        self.reset_parameters()

    @classmethod
    def target_grids(cls, config: SequenceConcatConfig, encoders: Mapping[str, EncoderInfo]) -> dict[str, Grid]:
        """The grid on which each encoder's tokens are taken."""
        return {name: config.grid or info.grid for name, info in encoders.items()}

    @classmethod
    def layout(cls, config: SequenceConcatConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        at_least(f"connector {config.type}", encoders, 1)
        grids = cls.target_grids(config, encoders)
        for name, info in encoders.items():
            check_grid(f"connector {config.type}", name, info.grid, grids[name], config.interpolation)
        return cls.joined(list(grids.values()))

    @classmethod
    def joined(cls, grids: list[Grid]) -> ViewLayout:
        """Layout of the grids in sequence: stacked where their columns agree, else one row."""
        total = sum(rows * cols for rows, cols in grids)
        same = len({cols for _, cols in grids}) == 1
        grid = (sum(rows for rows, _ in grids), grids[0][1]) if same else (1, total)
        return ViewLayout(num_tokens=total, grid=grid, in_place=len(grids) == 1)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        image = ImageSpec(height=16, width=16)
        encoders = {
            "semantic": EncoderInfo(image=image, grid=(2, 2), width=6),
            "spatial": EncoderInfo(image=image, grid=(4, 3), width=4),
        }
        return {"type": cls.name}, encoders, 8

    def output_layers(self) -> list[nn.Module]:
        return [projector[-1] for projector in self.projectors.values()]  # type: ignore[index]

    def project(self, features: Mapping[str, VisionFeatures], routing: Routing | None) -> list[Tensor]:
        """Every encoder's weighted tokens ``(B, N_e, L)``."""
        projected = []
        for name, tokens in read_features(self.encoders, features, routing).items():
            tokens = resample(tokens, self.encoders[name].grid, self.grids[name], self.config.interpolation)
            weight = expert_weight(routing, name, select=self.config.weighting == "select")
            projected.append(weigh(self.projectors[name](tokens), weight))
        return projected

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        return torch.cat(self.project(features, routing), dim=1)


@CONNECTORS.register("interleave")
class InterleaveConnector(SequenceConcatConnector):
    """E encoders on one grid → ``(B, N * E, L)``: position 0 of every encoder, then position 1, …"""

    Config = InterleaveConfig
    config: InterleaveConfig

    @classmethod
    def target_grids(cls, config: InterleaveConfig, encoders: Mapping[str, EncoderInfo]) -> dict[str, Grid]:
        return {name: config.grid or next(iter(encoders.values())).grid for name in encoders}

    @classmethod
    def joined(cls, grids: list[Grid]) -> ViewLayout:
        rows, cols = grids[0]
        grid = (rows, cols * len(grids))
        return ViewLayout(num_tokens=grid[0] * grid[1], grid=grid, in_place=len(grids) == 1)

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        config, encoders, width = super().tiny()
        return {**config, "interpolation": "bilinear"}, encoders, width

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        return torch.stack(self.project(features, routing), dim=2).flatten(1, 2)
