"""What is a view of a picture here?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from mllm.config import StrictModel, validate
from mllm.errors import ConfigError
from mllm.processing.views import VIEWS
from mllm.types import Grid, ImageSpec, ViewLayout, VisualLayout

Size = tuple[int, int]
"""(height, width) in pixels."""


class View(NamedTuple):
    """What one encoder sees of a picture, cut out at the encoder's own size.

    picture: (height, width) to which the picture is resized; canvas: (height, width) of the black plane it is laid on, with
    its (top, left) at ``place``; corner: (top, left) of what is cut out. Without ``canvas`` the view is the whole picture as
    the encoder's `ImageSpec` says. stride: only every so many-th row and column of the canvas is taken; as_spec: the picture
    fills the canvas by the `ImageSpec`'s own way of resizing, where it is squashed to ``picture`` else; patch: the picture at
    this size is given as squares of so many pixels, in rows, each channel by channel.
    """

    picture: Size = (0, 0)
    canvas: Size | None = None
    place: Grid = (0, 0)
    corner: Grid = (0, 0)
    stride: int = 1
    as_spec: bool = False
    patch: int = 0


WHOLE = View()


class ViewsConfig(StrictModel):
    """What every way of looking has."""

    type: str


class BudgetConfig(ViewsConfig):
    """Ways of looking that can be told to take fewer tokens."""

    max_visual_tokens: int | None = Field(default=None, ge=1)
    """Most visual tokens of one picture: of all tilings (sizes) only those are chosen from that stay below it."""
    max_sample_tokens: int | None = Field(default=None, ge=1)
    """Most visual tokens of all pictures of one sample or request together: each has an equal share."""


class Views:
    """One way of looking at a picture: from its size alone to views, and to the tokens they become. Pure arithmetic."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[ViewsConfig]] = ViewsConfig
    needs_size: ClassVar[bool] = True
    """Whether another size can mean other tokens."""
    native: ClassVar[bool] = False
    """Whether encoders are given a picture's patches in a grid of the picture's own."""

    @classmethod
    def whole_only(cls, config: Any) -> Sequence[str]:
        """Encoders that see the whole picture alone, whatever their neighbours see."""
        return ()

    @classmethod
    def limited(cls, config: Any, view: ViewLayout, lead: ImageSpec, limit: int) -> Any:
        """The config with only those choices that take at most ``limit`` tokens. Raises `DataError` where there is none."""
        return config

    @classmethod
    def marks(cls, config: Any) -> dict[str, str]:
        """Texts of the vocabulary's tokens that stand around and inside a visual, by what they are for."""
        return {}

    @classmethod
    def with_ids(cls, config: Any, id_of: Callable[[str], int]) -> Any:
        """The config with the ids of `marks`."""
        return config

    @classmethod
    def opening(cls, config: Any) -> bool:
        """Whether a learned token stands before the visual."""
        return False

    @classmethod
    def newlines(cls, config: Any, view: ViewLayout) -> bool:
        """Whether rows are closed by a token that the model learns."""
        return False

    @classmethod
    def views(cls, config: Any, lead: ImageSpec, image: ImageSpec, size: Size) -> tuple[View, ...]:
        """What an encoder that takes ``image`` sees of a picture of ``size``. lead: what the model's first encoder takes;
        it decides for all, so that every encoder has the same views."""
        raise NotImplementedError

    @classmethod
    def layout(cls, config: Any, view: ViewLayout, lead: ImageSpec, size: Size) -> VisualLayout:
        """The tokens of a picture of ``size``, whose views each become ``view``."""
        raise NotImplementedError

    @classmethod
    def largest(cls, config: Any, lead: ImageSpec) -> list[Size]:
        """Sizes of which one takes the most tokens of all."""
        raise NotImplementedError

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        """The smallest sensible configs; the contract tests build them."""
        return [{"type": cls.name}]


def views_config(spec: Mapping[str, Any] | ViewsConfig | None, where: str = "model.views") -> ViewsConfig:
    """``{type: name, …}`` → the strict config of the way registered under that name; None: ``single``.

    Raises `ConfigError` (`UnknownName` for the type) that starts with ``where``.
    """
    if isinstance(spec, ViewsConfig):
        return spec
    if spec is None:
        spec = {"type": "single"}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise ConfigError(f"{where}: expected a mapping with a type, e.g. {{type: tiles}}. Types: {', '.join(VIEWS)}")
    return validate(VIEWS.get(spec["type"]).Config, spec, where=where)
