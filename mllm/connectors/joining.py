"""How do the tokens of a visual's views become the visual's own?"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.errors import AlignmentError
from mllm.types import Block, ViewLayout, VisionFeatures, VisualLayout

NEWLINE = -1


def join_views(
    tokens: Tensor, layouts: Sequence[VisualLayout], view: ViewLayout, newline: Tensor | None = None
) -> Tensor:
    """Tokens ``(V, M, L)`` of all views of all visuals → ``(ΣM, L)``, in the order of the visuals.

    layouts: one per visual; newline ``(L,)``: the learned token that closes a row. Raises `AlignmentError` when the layouts
    speak of another number of views.
    """
    expected = sum(layout.num_views for layout in layouts)
    if expected != tokens.shape[0]:
        raise AlignmentError(f"features of {tokens.shape[0]} views where {len(layouts)} visuals have {expected}")
    if newline is None and all(_is_plain(layout, view) for layout in layouts):
        return tokens.flatten(0, 1)
    blocks = [block for layout in layouts for block in layout.blocks if not block.ids]
    owners = [number for number, layout in enumerate(layouts) for block in layout.blocks if not block.ids]
    firsts = [0, *accumulate(layout.num_views for layout in layouts)]
    places = [_in_batch(block, view, firsts[owner]) for block, owner in zip(blocks, owners)]
    index = torch.cat(places) if places else torch.zeros(0, dtype=torch.long)
    closing = index < 0
    joined = tokens.flatten(0, 1)[index.clamp(min=0).to(tokens.device)]
    if newline is not None:
        # Ranks reduce the same gradients whether their visuals have rows to close or not.
        joined = joined + 0.0 * newline.sum().to(joined.dtype)
        joined = torch.where(closing[:, None].to(tokens.device), newline.to(joined.dtype), joined)
    if not any(block.shrunk != (0, 0) for block in blocks):
        return joined
    parts = joined.split([len(place) for place in places])
    return torch.cat([_shrink(part, block, newline) for part, block in zip(parts, blocks)])


def _shrink(tokens: Tensor, block: Block, newline: Tensor | None) -> Tensor:
    """A joined map's tokens ``(N, L)`` at the block's own grid (bilinear, fp32), its rows closed again."""
    if block.shrunk == (0, 0):
        return tokens
    whole = tokens.transpose(0, 1).unflatten(1, block.shrunk)[None].float()
    small = F.interpolate(whole, size=block.grid[1:], mode="bilinear", align_corners=False)[0]
    return close_rows(small.flatten(1).transpose(0, 1).to(tokens.dtype), block, newline, None)


def spread_views(
    features: Mapping[str, VisionFeatures], layouts: Sequence[VisualLayout]
) -> Mapping[str, VisionFeatures]:
    """Features in which every encoder has every view: one that saw the thumbnail alone gets, for each tile, the part of its
    map that shows the tile (bilinear, fp32)."""
    few = {name for layout in layouts if not layout.frames for name, _ in layout.fewer if name in features}
    if not few:
        return features
    return {name: _spread(found, layouts) if name in few else found for name, found in features.items()}


def hold_frames(
    features: Mapping[str, VisionFeatures], layouts: Sequence[VisualLayout]
) -> Mapping[str, VisionFeatures]:
    """Features in which every encoder has every frame of a video: one that is given fewer keeps, between two of its frames, what it saw
    in the first."""
    few = {name for layout in layouts if layout.frames for name, _ in layout.fewer if name in features}
    return {name: _hold(found, layouts, name) if name in few else found for name, found in features.items()}


def _hold(found: VisionFeatures, layouts: Sequence[VisualLayout], encoder: str) -> VisionFeatures:
    """Features of the frames that an encoder is given → of all views, pictures as they are."""
    index, first = [], 0
    for layout in layouts:
        given = layout.frames_of(encoder)
        views = range(layout.num_views)
        index += [
            first + bisect_right(given, min(view, max(layout.frames, 1) - 1) if layout.frames else view) - 1
            for view in views
        ]
        first += len(given)
    if len(found.tokens) != first:
        raise AlignmentError(f"features of {len(found.tokens)} frames where encoder {encoder!r} is given {first}")
    places = torch.tensor(index, dtype=torch.long, device=found.tokens.device)
    others = {
        name: None if (value := getattr(found, name)) is None else value[places] for name in ("prefix", "attention")
    }
    return replace(found, tokens=found.tokens[places], **others)


def _spread(found: VisionFeatures, layouts: Sequence[VisualLayout]) -> VisionFeatures:
    """Features of one view a visual → of all views."""
    if len(found.tokens) != len(layouts):
        raise AlignmentError(f"features of {len(found.tokens)} thumbnails for {len(layouts)} visuals")
    rows, columns = found.grid
    maps = found.tokens.transpose(1, 2).unflatten(2, found.grid).float()
    owners, boxes = [], []
    for number, layout in enumerate(layouts):
        corners = iter(layout.corners)
        owners += [number] * layout.num_views
        boxes += [
            (0.0, 0.0, 1.0, 1.0) if view == layout.thumbnail else next(corners) for view in range(layout.num_views)
        ]
    box = torch.tensor(boxes, dtype=torch.float32, device=maps.device).view(-1, 4, 1)
    down, across = ((torch.arange(n, device=maps.device) + 0.5) / n for n in (rows, columns))
    y, x = box[:, 0] + down * (box[:, 2] - box[:, 0]), box[:, 1] + across * (box[:, 3] - box[:, 1])
    places = torch.stack([x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], dim=-1) * 2 - 1
    owner = torch.tensor(owners, dtype=torch.long, device=maps.device)
    seen = F.grid_sample(maps[owner], places, mode="bilinear", padding_mode="border", align_corners=False)
    tokens = seen.flatten(2).transpose(1, 2).to(found.tokens.dtype)
    prefix = None if found.prefix is None else found.prefix[owner.to(found.prefix.device)]
    return VisionFeatures(tokens, found.grid, prefix)


def close_rows(tokens: Tensor, block: Block, newline: Tensor | None, opening: Tensor | None) -> Tensor:
    """A map's tokens ``(N, L)`` with the visual's own learned tokens: ``opening`` before it, ``newline`` behind every row."""
    if block.newlines and newline is not None:
        rows = tokens[block.leading - (opening is not None) :].unflatten(0, (block.grid[1], block.grid[2]))
        ends = newline.to(tokens.dtype).expand(rows.shape[0], 1, -1)
        tokens = torch.cat([rows, ends], dim=1).flatten(0, 1)
    if opening is not None:
        tokens = torch.cat([opening.to(tokens.dtype)[None], tokens])
    return tokens


def source(block: Block, view: ViewLayout) -> Tensor:
    """For every token of a block, its place among the tokens of the block's views, end to end; `NEWLINE` for a row's end. Of a shrunk
    map: for every token before it is."""
    rows, columns = view.grid
    if block.shrunk != (0, 0):
        block = replace(block, grid=(1, *block.shrunk), num_tokens=0, newlines=False)
    _, height, width = block.grid
    if not block.newlines and block.tiles == (1, 1) and block.num_tokens == view.num_tokens:
        return torch.arange(view.num_tokens)
    assert view.in_place and not view.row_separators, "such maps are not laid side by side"
    row = (torch.arange(height) + block.corner[0])[:, None]
    column = (torch.arange(width) + block.corner[1])[None, :]
    tile = row // rows * block.tiles[1] + column // columns
    places = tile * view.num_tokens + row % rows * columns + column % columns
    if block.newlines:
        places = torch.cat([places, torch.full((height, 1), NEWLINE)], dim=1)
    return places.flatten()


def _in_batch(block: Block, view: ViewLayout, first_view: int) -> Tensor:
    places = source(block, view)
    return torch.where(places < 0, places, places + (first_view + block.view) * view.num_tokens)


def _is_plain(layout: VisualLayout, view: ViewLayout) -> bool:
    return layout.num_views == len(layout.blocks) and all(
        block.view == number and not block.ids and not block.newlines and block.num_tokens == view.num_tokens
        for number, block in enumerate(layout.blocks)
    )
