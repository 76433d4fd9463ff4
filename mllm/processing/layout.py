"""How many tokens does a visual become, and where do they lie? The one place that decides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mllm.errors import AlignmentError, ConfigError
from mllm.processing.frames import VideoSpec, video_spec
from mllm.processing.views import VIEWS
from mllm.processing.views.base import WHOLE, Size, View, ViewsConfig, views_config
from mllm.processing.views.single import whole_view
from mllm.types import Block, EncoderInfo, FastFrames, ImageSpec, ViewLayout, VisualLayout

if TYPE_CHECKING:
    from mllm.connectors.base import ConnectorConfig


class HasVisualParts(Protocol):
    """A model's config, or its section of a recipe. Either may have ``views``, ``video``, ``router``, ``heads`` and
    ``visual_tokenizer`` too."""

    @property
    def connector(self) -> Any: ...


IMAGE_SIZES = "image_sizes"
"""Batch key of the pictures' (height, width) ``(B, 2)``, where tokens depend on them."""
VIDEO_TIMES = "video_times"
"""Batch key of a model that takes video: when each frame is, in milliseconds ``(B, F)`` int64 (its number where no times are
known), -1 beyond a video's frames and for pictures."""


def view_layout(encoders: Mapping[str, EncoderInfo], connector: ConnectorConfig) -> ViewLayout:
    """Tokens of one view after a connector. encoders: name → sizes in the model's order; connector: its validated config.

    Raises `ConfigError` when an encoder's grid does not fit the connector.
    """
    from mllm.connectors import CONNECTORS

    view = CONNECTORS.get(connector.type).layout(connector, encoders)
    gathered = not all(info.in_place for info in encoders.values())
    return view.model_copy(update={"in_place": False}) if gathered else view


def layout(config: HasVisualParts, encoders: Mapping[str, EncoderInfo], size: Size | None) -> VisualLayout:
    """The tokens of one visual. config: anything with a ``connector`` and ``views`` (a model's config or its section of a
    recipe); size: its (height, width) in pixels, None where the views do not ask."""
    return layout_rules(config, encoders).layout(size)


def layout_rules(config: HasVisualParts, encoders: Mapping[str, EncoderInfo]) -> LayoutRules:
    """All that `layout` needs of a model, worked out once. A model without connector gives no visual tokens."""
    from mllm.connectors.build import connector_config

    images = {name: info.image for name, info in encoders.items()}
    if config.connector is None:
        return LayoutRules(ViewLayout(num_tokens=0, grid=(0, 0)), images)
    connector, views = connector_config(config.connector), views_config(getattr(config, "views", None))
    view = view_layout(encoders, connector)
    if VIEWS.get(views.type).native:
        view = view.model_copy(update={"cell": _cell(connector, encoders)})
    return LayoutRules(view, images, views, checked_video(config, view, views, list(images)))


def checked_video(
    config: HasVisualParts, view: ViewLayout, views: ViewsConfig, encoders: Sequence[str]
) -> VideoSpec | None:
    """A model's ``video`` section. Raises `ConfigError` beside what does not take video yet, by name."""
    video = video_spec(getattr(config, "video", None))
    if (view.shown > 1 or view.fast is not None) and (video is None or views.type != "single"):
        cure = "add model.video, e.g. {frames: 16}" if video is None else f"leave model.views ({views.type}) out"
        what = "thins" if view.fast is not None else "shows pictures as"
        what = f"takes {view.frames} frames together, of" if view.frames > 1 else what
        raise ConfigError(f"model.connector: {what} videos that are seen once; {cure}")
    if video is None:
        return None
    refused = {
        f"views of type {views.type}": views.type not in ("single", "tiles"),
        "views.thumbnail_only": bool(getattr(views, "thumbnail_only", None)),
        "views.max_sample_tokens": getattr(views, "max_sample_tokens", None) is not None,
        "views.several: whole": getattr(views, "several", None) == "whole",
        "views.marks": getattr(views, "marks", None) is not None,
        "a router": getattr(config, "router", None) is not None,
        "a visual tokenizer": getattr(config, "visual_tokenizer", None) is not None,
    }
    if found := [name for name, there in refused.items() if there]:
        raise ConfigError(f"model.video: {found[0]} takes no video yet; leave it or the video section out")
    for name in video.fewer:
        if name not in encoders:
            raise ConfigError(f"model.video.fewer: {name!r} is no encoder of this model; it has {', '.join(encoders)}")
    if video.fewer and len(video.fewer) == len(encoders):
        raise ConfigError(
            "model.video.fewer: every encoder is given fewer frames than there are; lower model.video.frames"
        )
    return video


def _cell(connector: Any, encoders: Mapping[str, EncoderInfo]) -> int:
    """`ViewLayout.cell` of a connector's config. Raises `ConfigError` where encoders or connector take one grid only."""
    from mllm.connectors import CONNECTORS

    for name, info in encoders.items():
        if info.image.patch is None:
            raise ConfigError(
                f"model.views: native needs encoders whose positions fit any grid of patches; {name!r} takes "
                f"{info.image.height} × {info.image.width} pixels only. Use siglip2 (type hf), qwen_vl, unit, eve, patch_conv or "
                "raw_patches"
            )
    cell = CONNECTORS.get(connector.type).native_cell(connector)
    if cell is None:
        fitting = [name for name in CONNECTORS if CONNECTORS.get(name).native_cell(_tiny(name)) is not None]
        raise ConfigError(
            f"model.connector: {connector.type} takes one grid only, not views native; use {', '.join(fitting)}"
        )
    return cell


def _tiny(name: str) -> Any:
    from mllm.connectors import CONNECTORS
    from mllm.connectors.build import connector_config

    return connector_config(CONNECTORS.get(name).tiny()[0])


@dataclass
class LayoutRules:
    """What decides how one model looks at a visual and how that lies in the sequence.

    view: what the connector makes of one view; images: encoder → the pixels it takes, in the model's order; views: the way of
    looking; video: which frames of a video are seen (None: the model takes none).
    """

    view: ViewLayout
    images: Mapping[str, ImageSpec]
    views: ViewsConfig = field(default_factory=lambda: views_config(None))
    video: VideoSpec | None = None
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def needs_size(self) -> bool:
        """Whether a visual's tokens depend on its size."""
        return VIEWS.get(self.views.type).needs_size

    @property
    def newlines(self) -> bool:
        """Whether the model has a learned newline token of its own."""
        return VIEWS.get(self.views.type).newlines(self.views, self.view)

    @property
    def opening(self) -> bool:
        """Whether the model has a learned token of its own before a visual."""
        return VIEWS.get(self.views.type).opening(self.views)

    @property
    def native(self) -> bool:
        """Whether pixels come as patches."""
        return VIEWS.get(self.views.type).native

    @property
    def _lead(self) -> ImageSpec:
        return next(iter(self.images.values()), ImageSpec(height=1, width=1))

    @property
    def sample_budget(self) -> int | None:
        """Most visual tokens of all pictures of a sample together."""
        return getattr(self.views, "max_sample_tokens", None)

    def share(self, count: int, most: int = 0) -> int:
        """Most visual tokens of each of a sample's ``count`` pictures; 0: nothing but the picture's own budget binds. most: that the
        sample's dataset allows (0: any)."""
        share = VIEWS.get(self.views.type).share(self.views, self.view, count)
        return min(share, most) if share and most else share or most

    @property
    def shares(self) -> bool:
        """Whether a picture's neighbours in its sample can change how it is seen."""
        return VIEWS.get(self.views.type).shares(self.views)

    def layout(self, size: Size | None = None, limit: int = 0) -> VisualLayout:
        """The tokens of one visual of this (height, width). limit: most that it may take, as `share` gives it. Raises
        `DataError` for a limit that nothing fits."""
        size = self._checked(size)
        if (size, limit) not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            kind, views = VIEWS.get(self.views.type), self._within(limit)
            found = kind.layout(views, self.view, self._lead, size or (1, 1))
            if self.view.repeats > 1:
                blocks = tuple(replace(found.blocks[0], view=number) for number in range(self.view.repeats))
                found = replace(found, blocks=blocks)
            self._known[size, limit] = replace(found, num_views=self.view.shown) if self.view.shown > 1 else found
        return self._known[size, limit]

    def _within(self, limit: int) -> ViewsConfig:
        """The way of looking, with the choices that the budget leaves."""
        own = getattr(self.views, "max_visual_tokens", None)
        limit = min(limit or own, own or limit) if limit or own else 0
        if not limit:
            return self.views
        if ("within", limit) not in self._known:
            kind = VIEWS.get(self.views.type)
            self._known["within", limit] = kind.limited(self.views, self.view, self._lead, limit)
        return self._known["within", limit]

    def video_layout(self, frames: int, stamps: Sequence[Sequence[int]] = ()) -> VisualLayout:
        """The tokens of a video of so many frames, each seen once as a whole. stamps: ids of the text before each frame (of the
        first, where several become one set of tokens)."""
        fewer = () if self.video is None else self.video.fewer_of(frames)
        if self.view.fast is not None and frames > 1:
            return replace(fast_layout(self.view, self.view.fast, frames, stamps), fewer=fewer)
        together = self.view.frames
        blocks: list[Block] = []
        for number, first in enumerate(range(0, frames, together)):
            if stamps and stamps[first]:
                blocks.append(Block(len(stamps[first]), ids=tuple(stamps[first])))
            blocks.append(whole_view(self.view, number))
        return VisualLayout(tuple(blocks), num_views=-(-frames // together) * together, fewer=fewer, frames=frames)

    def timed_layout(self, milliseconds: Sequence[int], write: Callable[[str], Sequence[int]]) -> VisualLayout:
        """`video_layout` of frames shown at these times, with the text that the model's ``video`` section puts before them. write: a
        text's token ids."""
        stamps = [] if self.video is None else self.video.stamps(milliseconds)
        return self.video_layout(len(milliseconds), [write(text) for text in stamps])

    def layouts(self, sizes: Any, count: int | None = None, times: Tensor | None = None) -> list[VisualLayout]:
        """The tokens of several visuals. sizes: ``(B, 2)`` tensor or pairs, ``(B, 3)`` with each one's `share`; None where they do
        not matter, with ``count``; times ``(B, F)``: `VIDEO_TIMES` (texts before frames are not made of it). Raises
        `AlignmentError` when they matter and are missing."""
        if times is not None:
            pictures = self.layouts(sizes, len(times) if count is None else count)
            return [
                self.video_layout(n) if n else p for n, p in zip(times.ge(0).sum(-1).tolist(), pictures, strict=True)
            ]
        if not self.needs_size:
            return [self.layout()] * (len(sizes) if count is None else count)
        if sizes is None and count == 0:
            return []
        if sizes is None or (count is not None and len(sizes) != count):
            raise AlignmentError(
                f"{IMAGE_SIZES}: this model's views ({self.views.type}) depend on the pictures' sizes; expected one "
                f"(height, width) per image, got {'none' if sizes is None else f'{len(sizes)} for {count} images'}"
            )
        pairs = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        # Beside samples with a share, those without one are widened with -1.
        return [self.layout((int(row[0]), int(row[1])), max(int(row[2]), 0) if len(row) > 2 else 0) for row in pairs]

    def view_boxes(self, size: Size | None = None, limit: int = 0) -> dict[str, tuple[View, ...]]:
        """What each encoder sees of one visual."""
        size, kind = self._checked(size), VIEWS.get(self.views.type)
        patches, config = self.layout(size, limit).patches, self._within(limit)
        if patches is not None:
            whole_of = {
                name: (patches[0] * (i.patch or 1), patches[1] * (i.patch or 1)) for name, i in self.images.items()
            }
            return {name: (View(at, at, patch=self.images[name].patch or 1),) for name, at in whole_of.items()}
        lead, whole = self._lead, kind.whole_only(config)
        return {
            name: (WHOLE,) if name in whole else kind.views(config, lead, image, size or (1, 1))
            for name, image in self.images.items()
        }

    def largest(self) -> Size:
        """A (height, width) that takes the most tokens of all."""
        sizes = VIEWS.get(self.views.type).largest(self._within(0), self.view, self._lead)
        return max(sizes, key=lambda size: self.layout(size).num_tokens)

    def describe(self) -> str:
        """Visual tokens of one image, in words: ``576``, or ``up to 2928``."""
        most = self.layout(self.largest()).num_tokens
        words = f"up to {most}" if self.needs_size else f"{most}"
        return words if self.video is None else f"{words} (a video: up to {self.longest().num_tokens})"

    def longest(self) -> VisualLayout:
        """Of all visuals the one with most views: a video where the model takes any (the text before frames not counted)."""
        picture = self.layout(self.largest())
        film = picture if self.video is None else self.video_layout(self.video.most)
        return max(picture, film, key=lambda layout: layout.num_views)

    def key(self) -> str:
        """Text that differs where the tokens of some visual differ."""
        lead = self._lead
        video = "" if self.video is None else self.video.model_dump_json()
        return (
            f"{self.view.model_dump_json()}{self.views.model_dump_json()}{lead.height}x{lead.width}p{lead.patch}{video}"
        )

    def _checked(self, size: Size | None) -> Size | None:
        if not self.needs_size:
            return None
        if size is None:
            raise ConfigError(
                f"views {self.views.type}: the tokens of a visual depend on its size, which was not given"
            )
        if min(size) < 1:
            raise AlignmentError(f"a visual of {size[0]} × {size[1]} pixels has no area")
        return size


def fast_layout(view: ViewLayout, fast: FastFrames, frames: int, stamps: Sequence[Sequence[int]] = ()) -> VisualLayout:
    """The tokens of a video of several frames of which only some stand in the sequence. stamps: ids of the text before each frame; of
    several that are averaged, the first one's is written."""
    rows, columns = (side // fast.cell for side in view.grid)
    grid = (1, rows // fast.side, columns // fast.side)
    blocks: list[Block] = []
    for number in fast.first(frames):
        if stamps and stamps[number]:
            blocks.append(Block(len(stamps[number]), ids=tuple(stamps[number])))
        blocks.append(Block(grid[1] * grid[2], grid, view=number))
    return VisualLayout(tuple(blocks), num_views=frames, frames=frames, num_slow=frames * rows * columns)


def expand(ids: Tensor, places: Sequence[int], layouts: Sequence[VisualLayout]) -> tuple[Tensor, Tensor]:
    """Ids ``(T,)`` with the placeholder at each of ``places`` made as long as its layout says, the vocabulary's tokens in it
    written; and how often each of the T tokens was taken (for what lies beside them)."""
    repeats = torch.ones_like(ids)
    repeats[list(places)] = torch.tensor([layout.num_tokens for layout in layouts], dtype=torch.long)
    longer = taken(ids, repeats)
    ends = repeats.cumsum(0)
    for place, layout in zip(places, layouts, strict=True):
        start = int(ends[place]) - layout.num_tokens
        for offset, token in layout.literals:
            longer[start + offset] = token
    return longer, repeats


def taken(values: Tensor, repeats: Tensor) -> Tensor:
    """Each of ``values`` ``(T,)`` as often as ``repeats`` ``(T,)`` says. By numpy: torch wakes all its threads for the few hundred numbers
    of a text, which costs milliseconds where other work has the cores. Both lie on the CPU."""
    return torch.from_numpy(np.repeat(values.numpy(), repeats.numpy()))


def visual_spans(ids: Tensor, placeholder: int | None, layouts: Sequence[VisualLayout]) -> list[tuple[int, int]]:
    """(start, stop) of every visual in ``(T,)``, in order; fewer than ``layouts`` where the text ends before. A span that
    the text cuts ends beyond it."""
    found = (ids == placeholder).nonzero().flatten().tolist()
    spans, used = [], 0
    for layout in layouts:
        if used >= len(found):
            break
        before = 0
        for _, block in layout.starts():
            if not block.ids:
                break
            before += block.num_tokens
        start = found[used] - before
        spans.append((start, start + layout.num_tokens))
        used += layout.num_placeholders
    return spans


def before_cut(spans: Sequence[tuple[int, int]], cut: int) -> int:
    """``cut``, or the start of the visual that it would cut."""
    return next((start for start, stop in spans if start < cut < stop), cut)


def visuals_of_rows(placeholders: Sequence[int], layouts: Sequence[VisualLayout]) -> list[list[VisualLayout]]:
    """Which visuals stand in which row of a batch. placeholders: how many each row has. Raises `AlignmentError` where a visual
    would begin in one row and end in another, or rows and visuals do not use each other up."""
    rows, left = [], list(layouts)
    for count in placeholders:
        row: list[VisualLayout] = []
        while count > 0 and left:
            row.append(left.pop(0))
            count -= row[-1].num_placeholders
        if count:
            break
        rows.append(row)
    if left or len(rows) < len(placeholders):
        raise AlignmentError(
            f"rows with {list(placeholders)} image placeholder tokens for {len(layouts)} images of "
            f"{[layout.num_placeholders for layout in layouts]}; was the text made by this model's own processor and not "
            "truncated?"
        )
    return rows


def token_cells(layout: VisualLayout, view: ViewLayout, number: int) -> dict[tuple[int, int], int]:
    """(row, column) of view ``number``'s own map → the place of its token among the visual's; cells that became none are
    absent. Empty where the connector keeps no map of the view."""
    if layout.patches is not None:
        return _native_cells(layout) if view.cell else {}
    if layout.num_slow:
        return {}
    rows, columns = view.grid
    if view.leading + rows * (columns + view.row_separators) != view.num_tokens:
        return {}
    cells: dict[tuple[int, int], int] = {}
    for start, block in layout.starts():
        tile = number - block.view
        if block.ids or not 0 <= tile < block.tiles[0] * block.tiles[1]:
            continue
        top = tile // block.tiles[1] * rows - block.corner[0]
        left = tile % block.tiles[1] * columns - block.corner[1]
        _, height, width = block.grid
        for r in range(max(0, -top), min(rows, height - top)):
            for c in range(max(0, -left), min(columns, width - left)):
                place = (top + r) * (width + block.row_separators) + left + c
                cells[r, c] = start + block.leading + place
    return cells


def _native_cells(layout: VisualLayout) -> dict[tuple[int, int], int]:
    """`token_cells` of a visual that is one map, perhaps with the vocabulary's tokens between its rows."""
    cells: dict[tuple[int, int], int] = {}
    for start, block in layout.starts():
        for row in range(0 if block.ids else block.grid[1]):
            for column in range(block.grid[2]):
                place = block.leading + row * (block.grid[2] + block.row_separators) + column
                cells[block.corner[0] + row, column] = start + place
    return cells
