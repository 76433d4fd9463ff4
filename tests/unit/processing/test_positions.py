"""Do tokens stand where transformers' models with several position axes put them, and where the documented rule says?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from mllm.errors import AlignmentError
from mllm.processing.layout import LayoutRules
from mllm.processing.positions import Shown, row_positions
from mllm.processing.views.base import views_config
from mllm.types import Block, ImageSpec, ViewLayout, VisualLayout

IMAGE, VIDEO, WORD = 300, 301, 7
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "vocab_size": 320}


def theirs(kind: str) -> Any:
    """transformers' own model, without memory: only its counting is asked."""
    vision = {"spatial_merge_size": 2, "depth": 1, "hidden_size": 32, "num_heads": 2, "tokens_per_second": 2}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 3, "vision_end_token_id": 4}
    text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    with torch.device("meta"):
        return AutoModel.from_config(CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **ids))


def frame(rows: int, columns: int, number: int = 0) -> Block:
    return Block(rows * columns, (1, rows, columns), view=number)


def clip(frames: int, rows: int, columns: int, stamp: int = 0) -> VisualLayout:
    """A video; stamp: tokens of the text before each of its frames."""
    blocks: list[Block] = []
    for number in range(frames):
        blocks += [Block(stamp, ids=(WORD,) * stamp)] * bool(stamp) + [frame(rows, columns, number)]
    return VisualLayout(tuple(blocks), num_views=frames, frames=frames)


VIEW = ViewLayout(num_tokens=6, grid=(2, 3))


def ours(row: list[Any], view: ViewLayout = VIEW, **options: Any) -> np.ndarray:
    """Positions of words (a number of them) and visuals that follow one another; times beside a layout: of its frames."""
    seen: list[bool] = []
    shown = []
    for part in row:
        if isinstance(part, int):
            seen += [False] * part
            continue
        layout, times = part if isinstance(part, tuple) else (part, ())
        shown.append(Shown(layout, tuple(times)))
        for block in layout.blocks:
            seen += [not block.ids] * block.num_tokens
    found, _ = row_positions(np.arange(len(seen)), np.flatnonzero(seen), shown, view, **options)
    return found


def reference(kind: str, rows: list[list[Any]], **options: Any) -> list[np.ndarray]:
    """The same by transformers, padded on the left and on the right, which must not matter. A visual: ``(id, (t, h, w), stamp)``."""
    ids: list[list[int]] = []
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for row in rows:
        made: list[int] = []
        for part in row:
            if isinstance(part, int):
                made += [WORD] * part
                continue
            token, (time, height, width), stamp = part
            grids[token].append([time, 2 * height, 2 * width])
            pieces = [height * width] * time if stamp else [time * height * width]
            for piece in pieces:
                made += [WORD] * stamp + [token] * piece
        ids.append(made)
    longest = max(len(row) for row in ids)
    found = []
    for left in (True, False):
        pads = [[0] * (longest - len(row)) for row in ids]
        table = torch.tensor([p + r if left else r + p for p, r in zip(pads, ids, strict=True)])
        mask = table.ne(0)
        types = table.eq(IMAGE).int() + 2 * table.eq(VIDEO).int()
        pictures, videos = (torch.tensor(grids[key]) if grids[key] else None for key in (IMAGE, VIDEO))
        given = {"image_grid_thw": pictures, "video_grid_thw": videos, "attention_mask": mask.long(), **options}
        axes, _ = theirs(kind).get_rope_index(table, types, **given)
        found.append([axes[:, row, mask[row]].numpy() for row in range(len(rows))])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    return found[0]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_pictures_stand_where_transformers_puts_them(kind):
    rows = [
        [3, (IMAGE, (1, 2, 3), 0), 5],
        [(IMAGE, (1, 5, 1), 0), 1, (IMAGE, (1, 2, 2), 0), 2, (IMAGE, (1, 1, 7), 0)],
        [4],
    ]
    mine = [
        [3, VisualLayout((frame(2, 3),)), 5],
        [VisualLayout((frame(5, 1),)), 1, VisualLayout((frame(2, 2),)), 2, VisualLayout((frame(1, 7),))],
        [4],
    ]
    for row, wanted in zip(mine, reference(kind, rows), strict=True):
        assert np.array_equal(ours(row), wanted)


def test_frames_of_a_clip_are_one_map_in_time():
    wanted = reference("qwen2_vl", [[2, (VIDEO, (3, 4, 2), 0), 3, (IMAGE, (1, 2, 2), 0), 1]])[0]
    assert np.array_equal(ours([2, clip(3, 4, 2), 3, VisualLayout((frame(2, 2),)), 1]), wanted)
    wanted = reference("qwen3_vl", [[2, (VIDEO, (3, 2, 3), 4), 3]])[0]  # a stamp before each frame
    assert np.array_equal(ours([2, clip(3, 2, 3, stamp=4), 3]), wanted)


@pytest.mark.parametrize("seconds", [0.25, 0.5, 1.0, 1.5])
def test_frames_stand_as_far_apart_in_time_as_their_seconds(seconds):
    rows = [[2, (VIDEO, (3, 6, 7), 0), 3]]
    wanted = reference("qwen2_5_vl", rows, second_per_grid_ts=torch.tensor([seconds]))[0]
    times = [round(1000 * seconds * number) + 40 for number in range(3)]
    assert np.array_equal(ours([2, (clip(3, 6, 7), times), 3], per_second=2.0), wanted)
    together = VIEW.model_copy(update={"frames": 2})  # a set of tokens for two frames, from the first one's time on
    double = [time for time in times for _ in range(2)]
    assert np.array_equal(ours([2, (clip(3, 6, 7), double), 3], together, per_second=2.0), wanted)


def test_text_begins_behind_the_last_frame_of_a_long_clip():
    """Unlike transformers 5.19, where it begins behind the rows and columns alone."""
    found = ours([1, clip(5, 2, 2), 2])
    assert found[0].tolist() == [0, *(1 + k for k in range(5) for _ in range(4)), 6, 7]
    assert found[1, -2:].tolist() == found[2, -2:].tolist() == [6, 7]
    behind = reference("qwen2_vl", [[1, (VIDEO, (5, 2, 2), 0), 2]])[0]
    assert np.array_equal(behind[:, :-2], found[:, :-2]) and behind[0, -2:].tolist() == [3, 4]
    assert ours([1, (clip(2, 2, 2), [5000, 2000]), 1], per_second=2.0)[0].tolist() == [
        0,
        *[1] * 8,
        3,
    ]  # never backwards


def test_what_is_no_map_stands_in_a_row():
    queries = ViewLayout(num_tokens=4, grid=(2, 2), in_place=False)
    assert ours([1, VisualLayout((frame(2, 2),)), 1], queries).tolist() == [list(range(6))] * 3
    closed = VisualLayout((Block(7, (1, 2, 2), row_separators=True, leading=1),))
    assert ours([1, closed, 1])[:, 1:].tolist() == [
        [1, 2, 2, 2, 2, 2, 2, 5],
        [1, 2, 2, 2, 3, 3, 3, 5],
        [1, 2, 3, 4, 2, 3, 4, 5],
    ], "a token before the map, and one that closes each row"
    marked = VisualLayout((Block(1, ids=(WORD,)), frame(1, 2), Block(1, ids=(WORD,)), frame(1, 2)))
    assert ours([marked])[2].tolist() == [0, 1, 2, 3, 4, 5] and ours([marked])[1].tolist() == [0, 1, 1, 3, 4, 4]


def test_tiles_and_thumbnail_are_maps_of_their_own():
    rules = LayoutRules(
        ViewLayout(num_tokens=4, grid=(2, 2)),
        {"e": ImageSpec(height=8, width=8)},
        views_config({"type": "tiles", "grids": [[1, 2], [2, 1]]}),
    )
    layout = rules.layout((8, 16))
    first, second = (block for block in layout.blocks if not block.ids)
    assert first.grid == (1, 2, 2) and second.grid == (1, 2, 4) and second.row_separators
    found = ours([layout, 1], rules.view)
    assert found[0].tolist() == [*[0] * 4, *[2] * 10, 7] and found[1, 4:14].tolist() == [2] * 5 + [3] * 5
    assert found[2, 4:14].tolist() == [2, 3, 4, 5, 6] * 2


def test_repeated_pictures_are_a_clip():
    twice = VIEW.model_copy(update={"repeats": 2})
    layout = VisualLayout((frame(2, 3), frame(2, 3, 1)))
    assert np.array_equal(ours([1, layout, 1], twice), ours([1, clip(2, 2, 3), 1]))


def test_packed_samples_begin_anew_and_later_passes_go_on():
    parts = [[2, VisualLayout((frame(2, 3),)), 3], [1], [clip(3, 1, 1), 4], [5]]
    alone = [ours(row) for row in parts]
    text = np.concatenate([np.arange(found.shape[1]) for found in alone])
    places = np.array([*range(2, 8), *range(12, 15)])
    shown = [Shown(parts[0][1]), Shown(parts[2][0])]  # type: ignore[arg-type]
    found, ahead = row_positions(text, places, shown, VIEW)
    assert np.array_equal(found, np.concatenate(alone, axis=1)) and ahead == 0
    whole = ours([2, VisualLayout((frame(2, 3),)), 3, VisualLayout((frame(1, 4),)), 2])
    _, ahead = row_positions(np.arange(11), places[:6], shown[:1], VIEW)
    assert ahead == 3 - 6
    later = [Shown(VisualLayout((frame(1, 4),)))]
    found, ahead = row_positions(np.arange(11, 17), np.arange(4), later, VIEW, shift=ahead)
    assert np.array_equal(found, whole[:, 11:]) and ahead == -3


def test_visuals_that_do_not_fit_their_places_are_refused():
    with pytest.raises(AlignmentError, match="5 image placeholder tokens for 1 images of 6"):
        row_positions(np.arange(8), np.arange(5), [Shown(VisualLayout((frame(2, 3),)))], VIEW)
