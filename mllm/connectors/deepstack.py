"""How do features of several depths of an encoder reach several layers of the language model (DeepStack)?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.build import connector_config
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, Grid, ImageSpec, Routing, ViewLayout, VisionFeatures


class DeepStackConfig(ConnectorConfig):
    """DeepStack (arXiv 2406.04334) in Qwen3-VL's form (arXiv 2511.21631): of the layers that an encoder names, the last one
    becomes the visual tokens, and each of the others is added to them behind one of the first layers of the language model. The
    number of tokens stays that of one layer."""

    type: str = "deepstack"
    levels: int = Field(default=3, ge=1)
    """Layers of the language model behind which something is added; every encoder names one layer more, e.g. ``layers: [6, 12, 18,
    -1]``."""
    each: dict[str, Any] = Field(default_factory=lambda: {"type": "pixel_shuffle"})
    """The connector that each of the encoder's layers goes through, with weights of its own."""

    @field_validator("each")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            connector_config(value, where="each")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value


@CONNECTORS.register("deepstack")
class DeepStackConnector(Connector):
    """``levels`` + 1 layers of every encoder, side by side in the width → tokens ``(V, M, (levels + 1) · L)``: what stands in the
    sequence, then what is added behind layer 0, 1, …"""

    Config = DeepStackConfig
    config: DeepStackConfig

    def __init__(self, config: DeepStackConfig, encoders: Mapping[str, EncoderInfo], width: int):
        super().__init__(config, encoders, width)
        self.layout(config, encoders)
        inner = connector_config(config.each)
        kind, one = CONNECTORS.get(inner.type), _of_one_layer(config, encoders)
        self.parts: Any = nn.ModuleList(kind(inner, one, width) for _ in range(config.levels + 1))
        self._grids = {name: info.grid for name, info in encoders.items()}
        self.reset_parameters()

    @classmethod
    def layout(cls, config: DeepStackConfig, encoders: Mapping[str, EncoderInfo]) -> ViewLayout:
        inner = connector_config(config.each)
        view = CONNECTORS.get(inner.type).layout(inner, _of_one_layer(config, encoders))
        if view.joins_perspectives or view.joins_scales or view.frames > 1 or view.levels:
            raise ConfigError(
                f"connector deepstack: each: {inner.type} joins several views, which no single layer can; use mlp, pixel_shuffle, "
                "average_pool or resampler"
            )
        return view.model_copy(update={"levels": config.levels})

    @classmethod
    def native_cell(cls, config: DeepStackConfig) -> int | None:
        inner = connector_config(config.each)
        return CONNECTORS.get(inner.type).native_cell(inner)

    @classmethod
    def attention_from(cls, config: DeepStackConfig, encoders: Mapping[str, EncoderInfo]) -> dict[str, int]:
        inner = connector_config(config.each)
        return CONNECTORS.get(inner.type).attention_from(inner, _of_one_layer(config, encoders))

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        info = EncoderInfo(image=ImageSpec(height=16, width=24), grid=(4, 6), width=15)
        return {"type": "deepstack", "levels": 2}, {"vision": info}, 8

    def output_layers(self) -> list[nn.Module]:
        return [layer for part in self.parts for layer in part.output_layers()]

    def view_tokens(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        count = self.config.levels + 1
        self._look_at({name: info.grid for name, info in self.encoders.items()})
        layers = {name: found.tokens.chunk(count, dim=-1) for name, found in features.items()}
        order = [count - 1, *range(count - 1)]  # the deepest layer is what stands in the sequence
        tokens = []
        for part, number in zip(self.parts, order, strict=True):
            own = {
                name: VisionFeatures(layers[name][number], found.grid, found.prefix, found.attention, found.grids)
                for name, found in features.items()
            }
            tokens.append(part.view_tokens(own, routing, text))
        return torch.cat(tokens, dim=-1)

    def _look_at(self, grids: dict[str, Grid]) -> None:
        """Tell the parts the grids of the pictures that come: in views native each has its own."""
        if grids != self._grids:
            self._grids, one = grids, _of_one_layer(self.config, self.encoders)
            for part in self.parts:
                part.encoders = one


def check_depths(levels: int, encoders: Mapping[str, Any], depth: int) -> None:
    """Raise `ConfigError` where an encoder does not name ``levels`` + 1 layers, or the language model has too few.

    Args:
        levels: of the connector.
        encoders: encoder name → its config.
        depth: layers of the language model.
    """
    for name, config in encoders.items():
        named = list(getattr(config, "layers", None) or [-1])
        if len(named) != levels + 1:
            raise ConfigError(
                f"model.connector.levels: {levels} levels take {levels + 1} layers of encoder {name!r}, which names {len(named)} "
                f"({named}); set model.encoders.{name}.layers, the deepest last, or levels: {max(len(named) - 1, 1)}"
            )
    if levels >= depth:
        raise ConfigError(
            f"model.connector.levels: {levels} levels need a language model of at least {levels + 1} layers; this one has {depth}"
        )


def _of_one_layer(config: DeepStackConfig, encoders: Mapping[str, EncoderInfo]) -> dict[str, EncoderInfo]:
    """The encoders as each part sees them: with the width of one of their layers."""
    count, found = config.levels + 1, {}
    for name, info in encoders.items():
        if info.width % count:
            raise ConfigError(
                f"connector deepstack: encoder {name!r} gives {info.width} channels, which are not {count} layers of one width "
                f"(levels: {config.levels}); let it name {count} layers of equal width"
            )
        found[name] = info.model_copy(update={"width": info.width // count})
    return found
