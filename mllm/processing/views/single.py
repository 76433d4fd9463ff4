"""What is seen when a picture is looked at once, as a whole?"""

from __future__ import annotations

from mllm.processing.views import VIEWS
from mllm.processing.views.base import WHOLE, Size, View, Views, ViewsConfig
from mllm.types import Block, ImageSpec, ViewLayout, VisualLayout


class SingleConfig(ViewsConfig):
    """One view, whatever the size."""

    type: str = "single"


@VIEWS.register("single")
class SingleView(Views):
    """Every encoder sees the whole picture at its own size."""

    Config = SingleConfig
    needs_size = False

    @classmethod
    def views(cls, config: SingleConfig, lead: ImageSpec, image: ImageSpec, size: Size) -> tuple[View, ...]:
        return (WHOLE,)

    @classmethod
    def layout(cls, config: SingleConfig, view: ViewLayout, lead: ImageSpec, size: Size) -> VisualLayout:
        return VisualLayout((whole_view(view, 0),))

    @classmethod
    def largest(cls, config: SingleConfig, view: ViewLayout, lead: ImageSpec) -> list[Size]:
        return [(lead.height, lead.width)]


def whole_view(view: ViewLayout, number: int) -> Block:
    """All tokens of one view as the connector gives them."""
    return Block(
        view.num_tokens, (1, *view.grid), row_separators=view.row_separators, view=number, leading=view.leading
    )
