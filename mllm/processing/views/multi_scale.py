"""Which crops of larger copies are seen, so that one encoder sees a picture at several scales (S2)?"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from mllm.errors import ConfigError
from mllm.processing.views import VIEWS
from mllm.processing.views.base import Size, View, Views, ViewsConfig
from mllm.processing.views.single import whole_view
from mllm.types import ImageSpec, ViewLayout, VisualLayout


class MultiScaleConfig(ViewsConfig):
    """S2 (arXiv 2403.13043): the picture at each scale, resized in the encoder's own way to ``scale`` times the encoder's size and
    cut into scale × scale crops. The connector ``multi_scale`` makes one map of them; others give all views, one after another."""

    type: str = "multi_scale"
    scales: list[int] = Field(default=[1, 2], min_length=1)

    @field_validator("scales")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if value[0] < 1 or sorted(set(value)) != value:
            raise ValueError(f"expected rising whole numbers from 1 on, got {value}")
        return value


@VIEWS.register("multi_scale")
class MultiScale(Views):
    """Scale after scale, each scale's crops in rows."""

    Config = MultiScaleConfig

    @classmethod
    def views(cls, config: MultiScaleConfig, lead: ImageSpec, image: ImageSpec, size: Size) -> tuple[View, ...]:
        found = []
        for scale in config.scales:
            large = (scale * image.height, scale * image.width)
            corners = [(r * image.height, c * image.width) for r in range(scale) for c in range(scale)]
            found += [View(large, large, (0, 0), corner, as_spec=True) for corner in corners]
        return tuple(found)

    @classmethod
    def layout(cls, config: MultiScaleConfig, view: ViewLayout, lead: ImageSpec, size: Size) -> VisualLayout:
        count = sum(scale**2 for scale in config.scales)
        thumbnail = 0 if config.scales[0] == 1 else None
        if not view.joins_scales:
            return VisualLayout(tuple(whole_view(view, k) for k in range(count)), count, thumbnail=thumbnail)
        if list(view.joins_scales) != config.scales:
            raise ConfigError(
                f"model.connector.scales: {list(view.joins_scales)} where model.views.scales is {config.scales}; give both the same"
            )
        return VisualLayout((whole_view(view, 0),), count, thumbnail=thumbnail, scales=tuple(config.scales))

    @classmethod
    def largest(cls, config: MultiScaleConfig, view: ViewLayout, lead: ImageSpec) -> list[Size]:
        return [(config.scales[-1] * lead.height, config.scales[-1] * lead.width)]

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"type": "multi_scale", "scales": [1, 2]}]
