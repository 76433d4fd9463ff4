"""What is a connector here?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.types import EncoderInfo, ImageLayout, Routing, VisionFeatures


class ConnectorConfig(StrictModel):
    """What every connector's config has."""

    type: str
    zero_init_output: bool = False
    """The last layer starts at zero, so every visual token is the zero vector until training moves it."""


class Connector(nn.Module):
    """Features of one or several encoders to visual tokens of language-model width."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[ConnectorConfig]] = ConnectorConfig
    uses_routing: ClassVar[bool] = False
    """Whether `forward` takes experts' weights; others get absent experts' features as zeros."""

    def __init__(self, config: Any, encoders: Mapping[str, EncoderInfo], width: int):
        """encoders: name → sizes, in the model's order; width: L, the language model's hidden size."""
        super().__init__()
        self.config, self.encoders, self.width = config, dict(encoders), width

    @classmethod
    def layout(cls, config: Any, encoders: Mapping[str, EncoderInfo]) -> ImageLayout:
        """How many tokens one image becomes. Pure arithmetic. Raises `ConfigError` when an encoder's grid does not
        fit."""
        raise NotImplementedError

    @classmethod
    def attention_from(cls, config: Any, encoders: Mapping[str, EncoderInfo]) -> dict[str, int]:
        """Encoders whose last attention map `forward` reads (`VisionFeatures.attention`) → number of heads it
        expects."""
        return {}

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], dict[str, EncoderInfo], int]:
        """The smallest sensible (config, encoders, width); the contract tests build it."""
        raise NotImplementedError

    def output_layers(self) -> list[nn.Module]:
        """Layers that are zero at the start under ``zero_init_output``."""
        return []

    def reset_parameters(self) -> None:
        """Fresh initial values for every parameter (children first), for instance after building on the meta device."""
        for module in reversed(list(self.modules())):
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        if self.config.zero_init_output:
            for layer in self.output_layers():
                for parameter in layer.parameters(recurse=False):
                    nn.init.zeros_(parameter)

    def forward(
        self, features: Mapping[str, VisionFeatures], routing: Routing | None = None, text: Tensor | None = None
    ) -> Tensor:
        """features of B images by encoder name → ``(B, M, L)``; text ``(B, L)``: the question's summary, for connectors
        that look at it. B = 0 is legal. An expert that no image of the batch uses may be absent from ``features``."""
        raise NotImplementedError
