"""What is a view of a picture here?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from mllm.config import StrictModel, validate
from mllm.errors import ConfigError, DataError
from mllm.processing.views import VIEWS
from mllm.types import Block, Grid, ImageSpec, ViewLayout, VisualLayout

Size = tuple[int, int]
"""(height, width) in pixels."""


class View(NamedTuple):
    """What one encoder sees of a picture, cut out at the encoder's own size.

    picture: (height, width) to which the picture is resized; canvas: (height, width) of the black plane it is laid on, with
    its (top, left) at ``place``; corner: (top, left) of what is cut out. Without ``canvas`` the view is the whole picture as
    the encoder's `ImageSpec` says; padded: as ``letterbox`` does it instead. stride: only every so many-th row and column of the
    canvas is taken; as_spec: the picture fills the canvas by the `ImageSpec`'s own way of resizing, where it is squashed to
    ``picture`` else; patch: the picture at this size is given as squares of so many pixels, in rows, each channel by channel.
    """

    picture: Size = (0, 0)
    canvas: Size | None = None
    place: Grid = (0, 0)
    corner: Grid = (0, 0)
    stride: int = 1
    as_spec: bool = False
    patch: int = 0
    padded: bool = False


WHOLE = View()
PADDED = View(padded=True)


class ViewsConfig(StrictModel):
    """What every way of looking has."""

    type: str


class Marks(StrictModel):
    """Tokens of the vocabulary around and inside a picture; those that are missing are added to it."""

    begin: str | None = None
    row: str | None = None
    """Between rows, not behind the last one (views native)."""
    end: str | None = None


class BudgetConfig(ViewsConfig):
    """Ways of looking that can be told to take fewer tokens."""

    max_visual_tokens: int | None = Field(default=None, ge=1)
    """Most visual tokens of one picture: of all tilings (sizes) only those are chosen from that stay below it."""
    max_sample_tokens: int | None = Field(default=None, ge=1)
    """Most visual tokens of all pictures of one sample or request together: each has an equal share."""
    marks: Marks | None = None
    mark_ids: dict[str, int] | None = None
    """Filled when the model is built; never written by hand."""


class Views:
    """One way of looking at a picture: from its size alone to views, and to the tokens they become. Pure arithmetic."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[ViewsConfig]] = ViewsConfig
    needs_size: ClassVar[bool] = True
    """Whether another size can mean other tokens."""
    native: ClassVar[bool] = False
    """Whether encoders are given a picture's patches in a grid of the picture's own."""

    @classmethod
    def whole_only(cls, config: ViewsConfig) -> Sequence[str]:
        """Encoders that see the whole picture alone, whatever their neighbours see."""
        return ()

    @classmethod
    def limited(cls, config: ViewsConfig, view: ViewLayout, lead: ImageSpec, limit: int) -> Any:
        """The config with only those choices that take at most ``limit`` tokens. Raises `DataError` where there is none."""
        return config

    @classmethod
    def share(cls, config: ViewsConfig, view: ViewLayout, count: int) -> int:
        """Most visual tokens of each of a sample's ``count`` pictures; 0: nothing but the picture's own budget binds. Raises
        `DataError` for more pictures than tokens."""
        budget = getattr(config, "max_sample_tokens", None)
        if budget is None or not count:
            return 0
        if count > budget:
            raise DataError(
                f"{count} pictures cannot share {budget} visual tokens (model.views.max_sample_tokens); give fewer, or raise it"
            )
        return budget // count

    @classmethod
    def shares(cls, config: ViewsConfig) -> bool:
        """Whether a picture's neighbours in its sample can change how it is seen."""
        return getattr(config, "max_sample_tokens", None) is not None

    @classmethod
    def marks(cls, config: ViewsConfig) -> dict[str, str]:
        """Texts of the vocabulary's tokens that stand around and inside a visual, by what they are for."""
        marks = getattr(config, "marks", None)
        return {} if marks is None else {key: text for key, text in marks.model_dump().items() if text is not None}

    @classmethod
    def with_ids(cls, config: ViewsConfig, id_of: Callable[[str], int]) -> Any:
        """The config with the ids of `marks`."""
        ids = {key: id_of(text) for key, text in sorted(cls.marks(config).items())}  # JSON is written sorted
        return config.model_copy(update={"mark_ids": ids}) if ids else config

    @classmethod
    def opening(cls, config: ViewsConfig) -> bool:
        """Whether a learned token stands before the visual."""
        return False

    @classmethod
    def newlines(cls, config: ViewsConfig, view: ViewLayout) -> bool:
        """Whether rows are closed by a token that the model learns."""
        return False

    @classmethod
    def views(cls, config: ViewsConfig, lead: ImageSpec, image: ImageSpec, size: Size) -> tuple[View, ...]:
        """What an encoder that takes ``image`` sees of a picture of ``size``. lead: what the model's first encoder takes;
        it decides for all, so that every encoder has the same views."""
        raise NotImplementedError

    @classmethod
    def layout(cls, config: ViewsConfig, view: ViewLayout, lead: ImageSpec, size: Size) -> VisualLayout:
        """The tokens of a picture of ``size``, whose views each become ``view``."""
        raise NotImplementedError

    @classmethod
    def largest(cls, config: ViewsConfig, view: ViewLayout, lead: ImageSpec) -> list[Size]:
        """Sizes of which one takes the most tokens of all, where each view becomes ``view``."""
        raise NotImplementedError

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        """The smallest sensible configs; the contract tests build them."""
        return [{"type": cls.name}]


def between_marks(config: BudgetConfig, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """A visual's blocks with the vocabulary's tokens before and behind them."""
    ids = config.mark_ids or {}
    begin, end = ([Block(1, ids=(ids[key],))] if key in ids else [] for key in ("begin", "end"))
    return (*begin, *blocks, *end)


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
