"""Which tiles is a large picture cut into, and how do their tokens lie? In the two published dialects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mllm.errors import DataError
from mllm.processing.views import VIEWS
from mllm.processing.views.base import PADDED, BudgetConfig, Size, View, Views, between_marks
from mllm.processing.views.single import whole_view
from mllm.types import Block, Box, Grid, ImageSpec, ViewLayout, VisualLayout

LLAVA_NEXT_GRIDS: list[Grid] = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
"""(rows, columns) of tiles, in the order of transformers' LLaVA-NeXT (the first one wins ties)."""


class TilesConfig(BudgetConfig):
    """A picture is seen as a whole (the thumbnail) and in tiles, each as large as the encoder's image.

    llava_next (LLaVA-NeXT, "AnyRes"): of the ``grids`` the one that keeps most pixels and wastes least; the picture keeps its
    aspect ratio and lies on black; thumbnail first, then one map of all tiles, without the rows and columns that are padding,
    each row closed by a learned newline. internvl (arXiv 2404.16821): the grid of ``min_tiles`` to ``max_tiles`` tiles whose
    aspect ratio is closest; the picture is squashed to it; tile after tile, then the thumbnail where there are several.
    falcon (arXiv 2501.16297): of all grids of at most ``max_tiles`` the one whose shape, then size, overlaps the picture's
    most; the picture is squashed to it; thumbnail first, then tile after tile. LLaVA-OneVision (arXiv 2408.03326) is llava_next
    with ``grids`` up to 6 × 6, ``max_joined: 9`` and ``several: whole``; InternVL's ``marks`` are ``<img>`` and ``</img>``.
    """

    type: str = "tiles"
    dialect: Literal["llava_next", "internvl", "falcon"] = "llava_next"
    grids: list[Grid] | None = None
    """llava_next: (rows, columns) to choose from; default 1×2, 2×1, 2×2, 3×1 and 1×3."""
    min_tiles: int | None = Field(default=None, ge=1)
    max_tiles: int | None = Field(default=None, ge=1)
    """internvl: default 1 and 12; falcon: max_tiles, default 9."""
    max_joined: int | None = Field(default=None, ge=1)
    """llava_next: a joined map of clearly more tokens than so many tiles have (1.21 times) is shrunk to about that number, bilinear
    (``anyres_max_9``)."""
    several: Literal["tiles", "whole"] = "tiles"
    """llava_next: what a sample with several pictures is seen in. whole: each padded to a square with the mean colour and seen once,
    a newline behind it."""
    thumbnail: bool = True
    thumbnail_only: list[str] = Field(default_factory=list)
    """Encoders (not the first) that see the thumbnail alone: beside a tile stands the part of their map that shows it."""

    allowed: list[Grid] | None = Field(default=None, exclude=True)
    """What a budget leaves of the grids (empty: the whole picture alone); never written by hand."""

    @model_validator(mode="after")
    def _of_one_dialect(self) -> TilesConfig:
        if self.dialect == "llava_next" and (self.min_tiles is not None or self.max_tiles is not None):
            raise ValueError("min_tiles and max_tiles belong to dialect internvl; llava_next takes grids: [[1, 2], …]")
        if self.dialect != "llava_next" and self.grids is not None:
            raise ValueError(f"grids belong to dialect llava_next; {self.dialect} takes min_tiles and max_tiles")
        if self.dialect != "llava_next" and (self.max_joined is not None or self.several != "tiles"):
            raise ValueError(f"max_joined and several belong to dialect llava_next, not {self.dialect}")
        if self.several == "whole" and self.thumbnail_only:
            raise ValueError("several: whole goes with encoders that see the same; leave thumbnail_only out")
        if self.marks is not None and self.marks.row is not None:
            raise ValueError("marks.row belongs to views native; tiles take begin and end")
        if self.dialect == "falcon" and self.min_tiles is not None:
            raise ValueError("min_tiles belongs to dialect internvl; falcon takes max_tiles")
        if self.grids is not None and (not self.grids or any(min(grid) < 1 for grid in self.grids)):
            raise ValueError(f"grids: expected at least one (rows, columns) of 1 or more each, got {self.grids}")
        least, most = self.tile_range
        if least > most:
            raise ValueError(f"min_tiles ({least}) is more than max_tiles ({most})")
        return self

    @property
    def tile_range(self) -> tuple[int, int]:
        """internvl and falcon: fewest and most tiles."""
        return self.min_tiles or 1, self.max_tiles or (9 if self.dialect == "falcon" else 12)

    @property
    def candidates(self) -> list[Grid]:
        """Grids to choose from, in order."""
        if self.allowed is not None:
            return self.allowed
        if self.dialect == "llava_next":
            return self.grids or LLAVA_NEXT_GRIDS
        if self.dialect == "falcon":
            return _anchors(self.tile_range[1])
        return _grids_of(*self.tile_range)


@VIEWS.register("tiles")
class Tiles(Views):
    """A thumbnail and tiles. The first encoder's image size is the tile that the grid is chosen by; every encoder sees the
    same tiles at its own size."""

    Config = TilesConfig

    @classmethod
    def newlines(cls, config: TilesConfig, view: ViewLayout) -> bool:
        return config.dialect == "llava_next" and _joins(view)

    @classmethod
    def grid(cls, config: TilesConfig, lead: ImageSpec, size: Size) -> Grid:
        """(rows, columns) of tiles for a picture of ``size``."""
        if config.dialect == "llava_next":
            return _most_effective(config.candidates, lead, size)
        if config.dialect == "falcon":
            return _best_overlap(config.candidates, lead, size)
        return _closest_ratio(config.candidates, lead, size)

    @classmethod
    def views(cls, config: TilesConfig, lead: ImageSpec, image: ImageSpec, size: Size) -> tuple[View, ...]:
        if not config.candidates:
            return (PADDED,)
        rows, columns = cls.grid(config, lead, size)
        canvas = (rows * image.height, columns * image.width)
        inside = _fit(size, canvas) if config.dialect == "llava_next" else canvas
        place = ((canvas[0] - inside[0]) // 2, (canvas[1] - inside[1]) // 2)
        tiles = [
            View(inside, canvas, place, (row * image.height, column * image.width))
            for row in range(rows)
            for column in range(columns)
        ]
        whole = (image.height, image.width)
        thumbnail = [View(whole, whole)] if _has_thumbnail(config, len(tiles)) else []
        return (*tiles, *thumbnail) if config.dialect == "internvl" else (*thumbnail, *tiles)

    @classmethod
    def layout(cls, config: TilesConfig, view: ViewLayout, lead: ImageSpec, size: Size) -> VisualLayout:
        if not config.candidates:
            ends = [_NEWLINE] if cls.newlines(config, view) else []
            return VisualLayout(between_marks(config, [whole_view(view, 0), *ends]), thumbnail=0)
        rows, columns = cls.grid(config, lead, size)
        count = rows * columns
        thumbnail = int(_has_thumbnail(config, count))
        seen: dict[str, Any] = {
            "num_views": count + thumbnail,
            "fewer": tuple((name, 1) for name in config.thumbnail_only),
            "tiles": (rows, columns),
            "thumbnail": (count if config.dialect == "internvl" else 0) if thumbnail else None,
            "corners": cls._corners(config, lead, size, (rows, columns)),
        }
        if not cls.newlines(config, view):
            whole = [whole_view(view, k) for k in range(count + thumbnail)]
            return VisualLayout(between_marks(config, whole), **seen)
        top, left, *full = _unpadded(view.grid, (rows, columns), lead, size, least=1 - thumbnail)
        height, width = _shrunk(config, view, (full[0], full[1]))
        tiles = Block(
            num_tokens=height * (width + 1),
            grid=(1, height, width),
            row_separators=True,
            newlines=True,
            view=thumbnail,
            tiles=(rows, columns),
            corner=(top, left),
            shrunk=(0, 0) if [height, width] == full else (full[0], full[1]),
        )
        blocks = [*(whole_view(view, k) for k in range(thumbnail)), tiles]
        return VisualLayout(between_marks(config, blocks), **seen)

    @classmethod
    def share(cls, config: TilesConfig, view: ViewLayout, count: int) -> int:
        share = super().share(config, view, count)
        if config.several != "whole" or count < 2:
            return share
        whole = cls.layout(_whole_only(config), view, ImageSpec(height=1, width=1), (1, 1)).num_tokens
        return min(share or whole, whole)

    @classmethod
    def shares(cls, config: TilesConfig) -> bool:
        return super().shares(config) or config.several == "whole"

    @classmethod
    def limited(cls, config: TilesConfig, view: ViewLayout, lead: ImageSpec, limit: int) -> TilesConfig:
        counts = {}
        for rows, columns in config.candidates:
            one = config.model_copy(update={"allowed": [(rows, columns)]})
            counts[rows, columns] = max(
                cls.layout(one, view, lead, size).num_tokens for size in cls.largest(one, view, lead)
            )
        allowed = [grid for grid in config.candidates if counts[grid] <= limit]
        if not allowed and config.several == "whole":
            whole = _whole_only(config)
            counts = {(1, 1): cls.layout(whole, view, lead, (1, 1)).num_tokens}
            if counts[1, 1] <= limit:
                return whole
        if not allowed:
            raise DataError(
                f"a picture may take {limit} visual tokens, and the smallest tiling takes {min(counts.values())}; raise the budget "
                "of model.views, give fewer pictures, or a connector with fewer tokens"
            )
        return config.model_copy(update={"allowed": allowed})

    @classmethod
    def whole_only(cls, config: TilesConfig) -> Sequence[str]:
        return config.thumbnail_only

    @classmethod
    def _corners(cls, config: TilesConfig, lead: ImageSpec, size: Size, grid: Grid) -> tuple[Box, ...]:
        """What each tile shows of the picture, from 0 to 1."""
        (rows, columns), canvas = grid, (grid[0] * lead.height, grid[1] * lead.width)
        high, wide = _fit(size, canvas) if config.dialect == "llava_next" else canvas
        top, left = (canvas[0] - high) // 2, (canvas[1] - wide) // 2
        down, across = (
            [(k * lead.height - top) / high for k in range(rows + 1)],
            [(k * lead.width - left) / wide for k in range(columns + 1)],
        )
        return tuple((down[r], across[c], down[r + 1], across[c + 1]) for r in range(rows) for c in range(columns))

    @classmethod
    def largest(cls, config: TilesConfig, view: ViewLayout, lead: ImageSpec) -> list[Size]:
        sizes = [(rows * lead.height, columns * lead.width) for rows, columns in config.candidates]
        return [*sizes, *_cut_sizes(config, view, lead)] or [(lead.height, lead.width)]

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [
            {"type": "tiles", "grids": [[1, 2], [2, 1], [2, 2]]},
            {"type": "tiles", "grids": [[2, 2], [1, 3]], "thumbnail": False},
            {"type": "tiles", "grids": [[1, 1], [1, 3], [3, 2]], "max_joined": 2, "several": "whole"},
            {"type": "tiles", "dialect": "internvl", "max_tiles": 4},
            {"type": "tiles", "dialect": "falcon", "max_tiles": 6},
        ]


_NEWLINE = Block(1, (1, 1, 0), row_separators=True, newlines=True)
"""A row without tokens and its end."""


def _whole_only(config: TilesConfig) -> TilesConfig:
    """No tiles at all."""
    return config.model_copy(update={"allowed": []})


def _shrunk(config: TilesConfig, view: ViewLayout, joined: Grid) -> Grid:
    """(rows, columns) that a joined map keeps (LLaVA-OneVision's ``anyres_max_N``)."""
    if config.max_joined is None:
        return joined
    ratio = math.sqrt(joined[0] * joined[1] / (config.max_joined * view.grid[0] * view.grid[1]))
    return joined if ratio <= _SPARED else (max(int(joined[0] // ratio), 1), max(int(joined[1] // ratio), 1))


_SPARED = 1.1
"""Times the side that a joined map may have before it is shrunk."""


def _cut_sizes(config: TilesConfig, view: ViewLayout, lead: ImageSpec) -> list[Size]:
    """Sizes whose padding leaves about as much as is just not shrunk: there, not in full grids, most tokens are."""
    if config.max_joined is None or not view.grid[0] * view.grid[1]:
        return []
    most, sizes = _SPARED**2 * config.max_joined * view.grid[0] * view.grid[1], []
    for tiles in config.candidates:
        rows, columns = tiles[0] * view.grid[0], tiles[1] * view.grid[1]
        if rows * columns <= most:
            continue
        for step in range(-3, 3):
            high, wide = int(most // columns) + step, int(most // rows) + step
            sizes += [(round(high / view.grid[0] * lead.height), tiles[1] * lead.width)] * (0 < high <= rows)
            sizes += [(tiles[0] * lead.height, round(wide / view.grid[1] * lead.width))] * (0 < wide <= columns)
    return [size for size in sizes if min(size) > 0]


def _joins(view: ViewLayout) -> bool:
    """Whether the tiles' maps can be laid side by side; else they follow one another, whole and without newlines."""
    return view.in_place and not view.row_separators and not view.leading


def _has_thumbnail(config: TilesConfig, num_tiles: int) -> bool:
    return config.thumbnail and (config.dialect != "internvl" or num_tiles > 1)


def _most_effective(grids: list[Grid], tile: ImageSpec, size: Size) -> Grid:
    """LLaVA's ``select_best_resolution``: the largest effective area, then the least waste, then the first."""
    height, width = size
    best, most, least = grids[0], 0, math.inf
    for rows, columns in grids:
        full = (rows * tile.height, columns * tile.width)
        scale = min(full[1] / width, full[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = full[0] * full[1] - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (rows, columns), effective, wasted
    return best


@lru_cache(maxsize=64)
def _grids_of(least: int, most: int) -> list[Grid]:
    """(rows, columns) of ``least`` to ``most`` tiles, by number of tiles, narrow ones first (as transformers orders them)."""
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= rows * columns <= most
    ]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


@lru_cache(maxsize=64)
def _anchors(most: int) -> list[Grid]:
    """Every (rows, columns) of at most ``most`` tiles, by number of tiles, then by rows (FALCON's order)."""
    return [(rows, count // rows) for count in range(1, most + 1) for rows in range(1, count + 1) if count % rows == 0]


def _best_overlap(grids: list[Grid], tile: ImageSpec, size: Size) -> Grid:
    """FALCON's ``anchor_rank``: most of 100 × the overlap with a box of the anchor's width and the picture's shape, plus the
    overlap with the picture itself; of equals the first, where published float32 arithmetic calls them equal."""
    anchors = np.array([(rows * tile.height, columns * tile.width) for rows, columns in grids], np.float32)
    picture = np.array(size, np.float32)
    shaped = np.stack([np.trunc(picture[0] / picture[1] * anchors[:, 1]), anchors[:, 1]], axis=1)

    def overlap(boxes: np.ndarray) -> np.ndarray:
        inside = np.minimum(anchors, boxes).prod(axis=-1)
        return inside / (anchors.prod(axis=-1) + boxes.prod(axis=-1) - inside + np.float32(1e-5))

    return grids[int(np.argmax(overlap(shaped) * np.float32(100) + overlap(np.broadcast_to(picture, anchors.shape))))]


def _closest_ratio(grids: list[Grid], tile: ImageSpec, size: Size) -> Grid:
    """InternVL's ``find_closest_aspect_ratio``: of equally close ones a larger grid where the picture fills half of it."""
    height, width = size
    best, closest = (1, 1), math.inf
    for rows, columns in grids:
        difference = abs(width / height - columns / rows)
        if difference < closest:
            best, closest = (rows, columns), difference
        elif difference == closest and width * height > 0.5 * tile.height * tile.width * rows * columns:
            best = (rows, columns)
    return best


def _fit(size: Size, canvas: Size) -> Size:
    """The largest (height, width) of a picture's aspect ratio inside a canvas."""
    height, width = size
    across, down = canvas[1] / width, canvas[0] / height
    if across < down:
        return min(math.ceil(height * across), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * down), canvas[1])


def _unpadded(view: Grid, tiles: Grid, tile: ImageSpec, size: Size, *, least: int) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of the picture in the joined map of the tiles (LLaVA-NeXT's ``unpad_image``). A strip may
    fill less than one row and keep none, as published, where a thumbnail shows it; ``least`` is 1 where none does."""
    rows, columns = tiles[0] * view[0], tiles[1] * view[1]
    # Measured in tokens: where these are not square, the picture is stretched as they are.
    height, width = size[0] * ((view[0] * tile.width) / (view[1] * tile.height)), size[1]
    if width / height > columns / rows:
        padding = (rows - max(least, int(round(height * (columns / width), 7)))) // 2
        return padding, 0, rows - 2 * padding, columns
    padding = (columns - max(least, int(round(width * (rows / height), 7)))) // 2
    return 0, padding, rows, columns - 2 * padding
