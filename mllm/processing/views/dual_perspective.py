"""Which crops and which thinned-out pictures are seen, so that detail and whole are both there (INF-LLaVA)?"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mllm.processing.views import VIEWS
from mllm.processing.views.base import WHOLE, Size, View, Views, ViewsConfig
from mllm.processing.views.single import whole_view
from mllm.types import ImageSpec, ViewLayout, VisualLayout


class DualPerspectiveConfig(ViewsConfig):
    """INF-LLaVA (arXiv 2407.16198): a picture ``n`` times the encoder's size, in the encoder's own way of resizing, is seen
    in n × n crops (local), as n × n pictures of every n-th pixel (global), and once as a whole: 2 n² + 1 views.

    The thumbnail is resized from the picture itself, antialiased, where the authors thin the large one out. The connector
    ``dual_perspective`` makes one map of them; others give all views, one after another.
    """

    type: str = "dual_perspective"
    n: int = Field(default=3, ge=1, le=8)
    """Sides of the division; 3 is the authors'."""


@VIEWS.register("dual_perspective")
class DualPerspective(Views):
    """n × n crops, n × n strided pictures, thumbnail; both in rows."""

    Config = DualPerspectiveConfig

    @classmethod
    def views(cls, config: DualPerspectiveConfig, lead: ImageSpec, image: ImageSpec, size: Size) -> tuple[View, ...]:
        n = config.n
        large = (n * image.height, n * image.width)
        parts = [(row, column) for row in range(n) for column in range(n)]
        crops = [View(large, large, (0, 0), (r * image.height, c * image.width), as_spec=True) for r, c in parts]
        thinned = [View(large, large, (0, 0), part, stride=n, as_spec=True) for part in parts]
        return (*crops, *thinned, WHOLE)

    @classmethod
    def layout(cls, config: DualPerspectiveConfig, view: ViewLayout, lead: ImageSpec, size: Size) -> VisualLayout:
        count = 2 * config.n**2 + 1
        shown = (count - 1,) if view.joins_perspectives else tuple(range(count))
        blocks = tuple(whole_view(view, number) for number in shown)
        return VisualLayout(blocks, count, thumbnail=count - 1, perspectives=config.n)

    @classmethod
    def largest(cls, config: DualPerspectiveConfig, view: ViewLayout, lead: ImageSpec) -> list[Size]:
        return [(config.n * lead.height, config.n * lead.width)]

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"type": "dual_perspective", "n": 2}]
