"""Which size is a picture seen at when it keeps its own aspect ratio, and how do its tokens lie?"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mllm.errors import DataError
from mllm.processing.views import VIEWS
from mllm.processing.views.base import BudgetConfig, Size, View, Views, between_marks
from mllm.processing.views.single import whole_view
from mllm.types import Block, Grid, ImageSpec, ViewLayout, VisualLayout

_DEFAULTS = {"naflex": 1024, "qwen": 1280, "solo": 1024, "eve": 576, "evev2": 2500}


class NativeConfig(BudgetConfig):
    """A picture is resized to whole patches near its own aspect ratio and given to the encoders as patches, without padding.

    rule: how its size is chosen. naflex: as large as ``max_patches`` allows (SigLIP 2). qwen: its own size, made smaller or
    larger only where it is beyond ``max_patches`` or below ``min_patches``. solo: the longer side to the next patch, at most
    ``max_side`` (arXiv 2407.06438). eve: the longer side to ``max_side``, 672 or 1344 (arXiv 2406.11832). evev2: to an area of
    ``max_side``² pixels (arXiv 2502.06788). No picture becomes more than ``max_patches`` tokens of the encoder, whatever the rule
    says; what would is made smaller.
    """

    type: str = "native"
    rule: Literal["naflex", "qwen", "solo", "eve", "evev2"] = "naflex"
    max_patches: int | None = Field(default=None, ge=1)
    """Default 1024 (naflex, solo), 1280 (qwen), 576 (eve; times (max_side / 672)²), 2500 (evev2)."""
    min_patches: int = Field(default=4, ge=1)
    """qwen only."""
    patch_size: int = Field(default=32, ge=1)
    """Pixels of a patch's side where the model has no encoders (``encoders: {}``): the connector is given the patches themselves,
    in ImageNet's normalisation."""
    max_side: int | None = Field(default=None, ge=1)
    """Pixels; default 1024 (solo), 672 (eve), 800 (evev2)."""
    newlines: bool = False
    """A learned token closes every row."""
    opening: bool = False
    """A learned token stands before the picture."""

    @model_validator(mode="after")
    def _of_one_rule(self) -> NativeConfig:
        if self.max_side is not None and self.rule in ("naflex", "qwen"):
            raise ValueError(f"max_side belongs to rules solo, eve and evev2; {self.rule} takes max_patches")
        if self.rule == "eve" and self.side % 336:
            raise ValueError(f"max_side: rule eve takes a multiple of 336, got {self.side}")
        if self.min_patches > self.budget:
            raise ValueError(f"min_patches ({self.min_patches}) is more than max_patches ({self.budget})")
        if self.marks is not None and (self.newlines or self.opening):
            raise ValueError(
                "give marks (tokens of the vocabulary) or newlines and opening (learned vectors), not both"
            )
        return self

    @property
    def side(self) -> int:
        """Pixels of the longer side (of a square's side: evev2)."""
        return self.max_side or {"solo": 1024, "eve": 672}.get(self.rule, 800)

    @property
    def budget(self) -> int:
        """Most tokens of the encoder."""
        default = _DEFAULTS[self.rule]
        return self.max_patches or (
            default * (self.side // 672) ** 2 if self.rule == "eve" and self.side >= 672 else default
        )


@VIEWS.register("native")
class Native(Views):
    """One view of a size of its own."""

    Config = NativeConfig
    native: ClassVar[bool] = True

    @classmethod
    def newlines(cls, config: NativeConfig, view: ViewLayout) -> bool:
        return config.newlines and _is_map(view)

    @classmethod
    def opening(cls, config: NativeConfig) -> bool:
        return config.opening

    @classmethod
    def views(cls, config: NativeConfig, lead: ImageSpec, image: ImageSpec, size: Size) -> tuple[View, ...]:
        rows, columns = cls.patches(config, lead, 1, size)
        side = image.patch or 1
        whole = (rows * side, columns * side)
        return (View(whole, whole, patch=side),)

    @classmethod
    def patches(cls, config: NativeConfig, lead: ImageSpec, cell: int, size: Size) -> Grid:
        """(rows, columns) of the encoder's tokens, whole multiples of ``cell``."""
        unit = (lead.patch or 1) * max(cell, 1)
        cells = max(config.budget // max(cell, 1) ** 2, 1)
        if config.rule == "naflex":
            target = naflex_size(size, unit, cells)
        elif config.rule == "qwen":
            least = -(-config.min_patches // max(cell, 1) ** 2)
            target = qwen_size(size, unit, least * unit * unit, cells * unit * unit)
        elif config.rule == "solo":
            width, height = solo_size((size[1], size[0]), unit, config.side)
            target = (height, width)
        elif config.rule == "eve":
            target = eve_size(size, config.side)
        else:
            scale = math.sqrt(size[0] * size[1]) / config.side
            target = (_up(size[0] / scale, unit), _up(size[1] / scale, unit))
        rows, columns = (max(math.ceil(side / unit), 1) for side in target)
        if rows * columns > cells:
            rows, columns = (side // unit for side in naflex_size((rows * unit, columns * unit), unit, cells))
        return rows * max(cell, 1), columns * max(cell, 1)

    @classmethod
    def layout(cls, config: NativeConfig, view: ViewLayout, lead: ImageSpec, size: Size) -> VisualLayout:
        grid = cls.patches(config, lead, view.cell or 1, size)
        ids, leading = config.mark_ids or {}, view.leading + config.opening
        row_end = [Block(1, ids=(ids["row"],))] if "row" in ids else []
        if not _is_map(view):
            block = whole_view(view, 0)
            block = Block(block.num_tokens + config.opening, block.grid, block.row_separators, leading=leading)
            return VisualLayout(between_marks(config, [block]), patches=grid)
        rows, columns = grid[0] // (view.cell or 1), grid[1] // (view.cell or 1)
        if row_end:
            lines = [Block(columns, (1, 1, columns), corner=(row, 0)) for row in range(rows)]
            inside = [block for line in lines for block in (line, *row_end)][:-1]
            return VisualLayout(between_marks(config, inside), patches=grid)
        ends = view.row_separators or config.newlines
        count = leading + rows * (columns + ends)
        block = Block(count, (1, rows, columns), ends, config.newlines and not view.row_separators, leading=leading)
        return VisualLayout(between_marks(config, [block]), patches=grid)

    @classmethod
    def limited(cls, config: NativeConfig, view: ViewLayout, lead: ImageSpec, limit: int) -> NativeConfig:
        budget, most = config.budget, 0
        while budget >= 1:
            smaller = config.model_copy(update={"max_patches": budget, "min_patches": min(config.min_patches, budget)})
            most = max(cls.layout(smaller, view, lead, size).num_tokens for size in cls.largest(smaller, view, lead))
            if most <= limit:
                return smaller
            if view.cell == 0 or budget == 1:
                break
            budget = max(1, min(budget - 1, budget * limit // most))
        raise DataError(
            f"a picture may take {limit} visual tokens, and the smallest takes {most}; raise the budget of model.views, or give "
            "fewer pictures"
        )

    @classmethod
    def largest(cls, config: NativeConfig, view: ViewLayout, lead: ImageSpec) -> list[Size]:
        unit, most = lead.patch or 1, config.budget
        counts = sorted({most, *(2**power for power in range(most.bit_length())), math.isqrt(most)})
        grids = [(rows * unit, max(most // rows, 1) * unit) for rows in counts]
        strips = [(2**power, 2 ** (13 - power)) for power in range(14)]
        return [*grids, *strips, (4096, 4096)]

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [
            {"type": "native", "max_patches": 24},
            {"type": "native", "rule": "qwen", "max_patches": 30, "newlines": True, "opening": True},
        ]


def _is_map(view: ViewLayout) -> bool:
    """Whether the number of tokens follows the picture's grid."""
    return view.cell != 0


def _up(side: float, unit: int) -> int:
    return max(math.ceil(side / unit), 1) * unit


def naflex_size(size: Size, patch: int, max_patches: int, eps: float = 1e-5) -> Size:
    """The largest (height, width) of whole patches near the picture's aspect ratio with at most ``max_patches`` of them
    (SigLIP 2's, as in transformers)."""
    low, high = eps / 10, 100.0
    while high - low >= eps:
        scale = (low + high) / 2
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in size)
        low, high = (scale, high) if rows * columns <= max_patches else (low, scale)
    rows, columns = (max(1, math.ceil(side * low / patch)) for side in size)
    # A strip longer than the budget stays beyond it at any scale that the search tries.
    return min(rows, max_patches) * patch, min(columns, max(max_patches // min(rows, max_patches), 1)) * patch


def qwen_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Qwen-VL's ``smart_resize`` as in ``qwen_vl_utils``: both sides rounded to ``factor``, the area kept between the two bounds.
    transformers' copy rounds a side below half a ``factor`` to nothing, and then enlarges the picture."""
    height, width = size
    rows, columns = (max(factor, round(side / factor) * factor) for side in size)
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / beta / factor) * factor) for side in size)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * beta / factor) * factor for side in size)
    return rows, columns


def solo_size(size: tuple[int, int], patch: int = 32, max_resolution: int = 1024) -> tuple[int, int]:
    """SOLO's ``get_resize_output_image_size``, (width, height) in and out: the longer side to the next whole patch, at most
    ``max_resolution``; the shorter by the same factor, rounded down to a pixel, then up to a patch. As published the shorter
    side of a long strip becomes 0; as a view it has one patch."""
    longer, shorter = max(size), min(size)
    long = min(math.ceil(longer / patch) * patch, max_resolution)
    short = math.ceil(int(long * shorter / longer) / patch) * patch
    return (long, short) if size[0] >= size[1] else (short, long)


def eve_size(size: Size, max_side: int = 672) -> Size:
    """EVE's (height, width): the longer side ``max_side``; the shorter in whole 14-pixel patches of the 336 scale."""
    ratio = max_side // 336
    longer = max(size)
    height, width = (336 if side == longer else max(math.ceil(336 * side / longer / 14), 1) * 14 for side in size)
    return height * ratio, width * ratio
