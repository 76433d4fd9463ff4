"""Where does a token stand on each position axis (time, row, column) of a language model with M-RoPE?

What transformers' ``get_rope_index`` and Qwen2-VL's paper (arXiv 2409.12191, section 2.1) say, for every layout of ours:

- Text stands at one position on all axes, and each token one further. So do the vocabulary's tokens inside a visual (time stamps,
  marks of tiles and rows), tokens before a map (EVE's class token), and all tokens of a visual that show no one place of it (a
  resampler's queries, several encoders' tokens one after another): they are an order and no map.
- A token of a map stands in its row and column, counted from where the map begins; a learned token that closes a row is that row's
  last column. Every map begins where what stood before it ended: the thumbnail and the joined tiles of a picture are two maps.
- Frames of a clip that follow one another without text between are one map in time. They begin at the same row and column and are one
  further in time each, or as many as have passed by their times (Qwen2.5-VL: 2 positions a second). A frame behind a time stamp is a map of
  its own (Qwen3-VL).
- What follows begins one beyond the furthest position on any axis. (transformers 5.3 to 5.19 counts rows and columns alone, so that text
  after a clip stands inside it; Qwen's own code, vLLM and earlier transformers do as we do. Pictures are the same either way.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mllm.errors import AlignmentError
from mllm.types import Block, ViewLayout, VisualLayout

Numbers = np.ndarray


@dataclass(frozen=True)
class Shown:
    """One visual of a row. layout: how it lies; milliseconds: when each of its frames is; () where that is not asked."""

    layout: VisualLayout
    milliseconds: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Part:
    """Tokens that are laid out together. offsets: ``(3, count)``, from where they begin."""

    offsets: Numbers

    @property
    def count(self) -> int:
        return self.offsets.shape[1]

    @property
    def extent(self) -> int:
        return int(self.offsets.max()) + 1


def row_positions(
    text: Numbers,
    places: Numbers,
    visuals: Sequence[Shown],
    view: ViewLayout,
    *,
    per_second: float | None = None,
    shift: int = 0,
) -> tuple[Numbers, int]:
    """Positions of one row of a batch on three axes.

    Args:
        text: ``(T,)`` int64, the tokens' places in their sample; 0 begins a sample (packed rows hold several).
        places: ``(n,)`` int64, where visual tokens stand, ascending.
        visuals: whose tokens these are, in order.
        view: what the connector makes of one view.
        per_second: positions in time for each second between a clip's frames; None: one for each frame.
        shift: how far positions are ahead of ``text`` where the row begins (of earlier passes of the same text).

    Returns:
        ``(3, T)`` int64, and how far positions are ahead of ``text`` behind the row.

    Raises:
        AlignmentError: visuals have more or fewer tokens than there are places.
    """
    wanted = sum(visual.layout.num_placeholders for visual in visuals)
    if wanted != len(places):
        raise AlignmentError(
            f"{len(places)} image placeholder tokens for {len(visuals)} images of {wanted}; was the text made by this model's own "
            "processor and not truncated?"
        )
    ahead = np.full(len(text) + 1, shift, dtype=np.int64)
    begins = (np.flatnonzero((text[1:] == 0) | (np.diff(text) < 0)) + 1).tolist()
    found = np.zeros((3, len(text)), dtype=np.int64)
    used = 0
    for part in _parts(places, visuals, view, per_second):
        own = places[used : used + part.count]
        used += part.count
        while begins and begins[0] <= own[0]:
            ahead[begins.pop(0) :] = 0
        found[:, own] = part.offsets - np.arange(part.count)
        ahead[own[-1] + 1 :] += part.extent - part.count
    if begins:
        ahead[begins[0] :] = 0
    return found + text + ahead[:-1], int(ahead[-1])


def _parts(places: Numbers, visuals: Sequence[Shown], view: ViewLayout, per_second: float | None) -> Iterator[_Part]:
    """What is laid out together, in the order of the placeholders."""
    used = 0
    for visual in visuals:
        moving = visual.layout.frames > 1 or view.repeats > 1
        clip: list[Block] = []
        for block in visual.layout.blocks:
            if block.ids:
                continue
            follows = used > 0 and bool(places[used] == places[used - 1] + 1)
            alone = not moving or not _is_map(block, view) or bool(block.leading)
            if clip and (alone or not follows or block.grid != clip[0].grid):
                yield _clip(clip, visual, view, per_second)
                clip = []
            used += block.num_tokens
            if not alone:
                clip.append(block)
                continue
            if text := block.leading if _is_map(block, view) else block.num_tokens:
                yield _Part(np.tile(np.arange(text), (3, 1)))
            if _is_map(block, view):
                yield _Part(_cells(block))
        if clip:
            yield _clip(clip, visual, view, per_second)


def _is_map(block: Block, view: ViewLayout) -> bool:
    """Whether every token, those before the map aside, shows a place."""
    time, rows, columns = block.grid
    return view.in_place and block.num_tokens == block.leading + time * rows * (columns + block.row_separators)


def _cells(block: Block) -> Numbers:
    """``(3, N)``: time, row and column of each token of a map."""
    time, rows, columns = block.grid
    return np.indices((time, rows, columns + block.row_separators)).reshape(3, -1)


def _clip(blocks: Sequence[Block], visual: Shown, view: ViewLayout, per_second: float | None) -> _Part:
    """Frames that follow one another, as one map."""
    cells = []
    for number, block in enumerate(blocks):
        one = _cells(block)
        if per_second is not None and visual.milliseconds:
            frame, first = (visual.milliseconds[each.view * view.frames] for each in (block, blocks[0]))
            number = max(int((frame - first) * per_second / 1000), 0)
        one[0] += number
        cells.append(one)
    return _Part(np.concatenate(cells, axis=1))
