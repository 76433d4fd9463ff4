"""Is a visual's layout the published arithmetic, and does everything that reads it agree with it?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from mllm.connectors.joining import join_views
from mllm.errors import AlignmentError, ConfigError, UnknownName
from mllm.processing.layout import LayoutRules, before_cut, expand, token_cells, visual_spans, visuals_of_rows
from mllm.processing.pixel_keys import PixelKeys
from mllm.processing.views import VIEWS
from mllm.processing.views.base import views_config
from mllm.processing.views.tiles import Tiles
from mllm.types import Block, ImageSpec, ViewLayout, VisualLayout
from tests.golden.fill import load

CLIP = ImageSpec(height=336, width=336)


def next_rules(view: ViewLayout | None = None, **changes: object) -> LayoutRules:
    view = view or ViewLayout(num_tokens=576, grid=(24, 24))
    return LayoutRules(view, {"clip": CLIP}, views_config({"type": "tiles", **changes}))


def golden(name: str):
    return load(f"tests/golden/{name}.json")


def test_llava_next_grids_are_the_published_ones():
    _, given, expected = golden("anyres_select")
    config = views_config(
        {"type": "tiles", "grids": [(h // 336, w // 336) for w, h in given["input.candidates"].tolist()]}
    )
    for (width, height), (columns, rows) in zip(given["input.size"].tolist(), expected["output.grid"].tolist()):
        assert Tiles.grid(config, CLIP, (height, width)) == (rows, columns), (width, height)


def test_internvl_grids_and_tiles_are_the_published_ones():
    _, given, expected = golden("pvc_tiling_and_frames")
    config, tile = (
        views_config({"type": "tiles", "dialect": "internvl", "max_tiles": 12}),
        ImageSpec(height=448, width=448),
    )
    rows = zip(given["input.size"].tolist(), expected["output.grid"].tolist(), expected["output.tiles"].tolist())
    for (width, height), (columns, rows_), tiles in rows:
        assert Tiles.grid(config, tile, (height, width)) == (rows_, columns), (width, height)
        assert len(Tiles.views(config, tile, tile, (height, width))) == tiles


def test_llava_next_token_counts_are_transformers_own_at_any_size():
    class Theirs:
        patch_size, num_additional_image_tokens = 14, 1
        image_processor = type(
            "Settings", (), {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
        )
        _get_unpadded_features = LlavaNextProcessor._get_unpadded_features

    rules, random = next_rules(), np.random.default_rng(0)
    sizes = [tuple(int(2**power) for power in random.uniform(0, 12, 2)) for _ in range(500)]
    for size in [*sizes, (1, 1), (1, 4000), (4000, 1), (37, 53)]:
        theirs = LlavaNextProcessor._get_number_of_features(Theirs(), *size, 336, 336) - 1  # without the class token
        assert rules.layout(size).num_tokens == theirs, size
    assert rules.describe() == "up to 2928" and rules.layout(rules.largest()).num_tokens == 2928


def test_a_layout_says_where_maps_newlines_and_vocabulary_stand():
    layout = next_rules().layout((480, 640))  # 2 × 2 tiles; 36 of the 48 rows are picture
    thumbnail, tiles = layout.blocks
    assert (thumbnail.num_tokens, tiles.grid, layout.num_views) == (576, (1, 36, 48), 5)
    assert layout.grid == (1, 36, 48) and len(layout.separators) == 36
    assert layout.separators[0] == 576 + 48 and layout.separators[-1] == layout.num_tokens - 1
    literal = VisualLayout((Block(1, ids=(7,)), Block(4, (1, 2, 2)), Block(2, ids=(8, 9))))
    assert (literal.num_tokens, literal.num_placeholders, literal.grid) == (7, 4, (1, 2, 2))
    assert literal.literals == ((0, 7), (5, 8), (6, 9))


def test_views_of_a_picture_are_joined_as_the_layout_says():
    """Tokens named by (view, row, column) end up where these stand in the picture."""
    rules = next_rules(ViewLayout(num_tokens=4, grid=(2, 2)), grids=[[1, 2], [2, 2]])
    sizes = [(336, 672), (100, 700), (700, 600)]
    layouts = [rules.layout(size) for size in sizes]
    views = sum(layout.num_views for layout in layouts)
    tokens = torch.arange(views * 4, dtype=torch.float32).view(views, 4, 1).requires_grad_()
    newline = torch.tensor([-1.0], requires_grad=True)
    joined = join_views(tokens, layouts, rules.view, newline)
    parts = [part.flatten().tolist() for part in joined.split([layout.num_tokens for layout in layouts])]
    assert parts[0] == [0, 1, 2, 3, *[4, 5, 8, 9, -1], *[6, 7, 10, 11, -1]]
    # 100 × 700 in 1 × 2 tiles of 2 × 2: the picture is 0.57 rows high; as published, all rows are padding then.
    assert parts[1] == [12, 13, 14, 15]
    tiles = [28, 29, 32, 33, -1, 30, 31, 34, 35, -1, 36, 37, 40, 41, -1, 38, 39, 42, 43, -1]
    assert parts[2] == [24, 25, 26, 27, *tiles]
    joined.sum().backward()
    assert newline.grad is not None and newline.grad.item() == 2 + 4 and tokens.grad is not None
    cells = token_cells(layouts[0], rules.view, 2)
    assert cells == {(0, 0): 6, (0, 1): 7, (1, 0): 11, (1, 1): 12}
    with pytest.raises(AlignmentError, match="features of 11 views where 2 visuals have 6"):
        join_views(tokens, layouts[:2], rules.view, newline)


def test_a_connector_without_places_gets_its_tiles_one_after_another():
    rules = next_rules(ViewLayout(num_tokens=6, grid=(1, 6), in_place=False))
    layout = rules.layout((480, 640))
    assert not rules.newlines and layout.num_tokens == 5 * 6 and not layout.separators
    rules = next_rules(ViewLayout(num_tokens=6, grid=(2, 2), row_separators=True))
    assert not rules.newlines and rules.layout((480, 640)).num_tokens == 5 * 6


def test_ids_are_expanded_cut_and_found_again_with_unlike_visuals():
    layouts = [
        VisualLayout((Block(1, ids=(7,)), Block(2, (1, 1, 2)), Block(1, ids=(8,)))),
        VisualLayout((Block(3, (1, 1, 3)),)),
    ]
    ids = torch.tensor([1, 5, 2, 5, 3])
    longer, repeats = expand(ids, [1, 3], layouts)
    assert longer.tolist() == [1, 7, 5, 5, 8, 2, 5, 5, 5, 3] and repeats.tolist() == [1, 4, 1, 3, 1]
    spans = visual_spans(longer, 5, layouts)
    assert spans == [(1, 5), (6, 9)]
    assert [before_cut(spans, cut) for cut in (0, 1, 2, 4, 5, 7, 9, 10)] == [0, 1, 1, 1, 5, 6, 9, 10]
    owned = visuals_of_rows([2, 0, 3], layouts)
    assert [len(row) for row in owned] == [1, 0, 1]
    for wrong in ([3, 2], [2], [2, 3, 3]):
        with pytest.raises(AlignmentError, match="placeholder tokens for 2 images"):
            visuals_of_rows(wrong, layouts)


def test_sizes_that_are_missing_or_empty_are_told():
    rules = next_rules()
    with pytest.raises(ConfigError, match="depend on its size"):
        rules.layout()
    with pytest.raises(AlignmentError, match=r"image_sizes.*got none"):
        rules.layouts(None, 2)
    assert rules.layouts(None, 0) == [], "a batch of text alone has no sizes"
    with pytest.raises(AlignmentError, match="got 1 for 2 images"):
        rules.layouts(torch.tensor([[3, 4]]), 2)
    with pytest.raises(AlignmentError, match="0 × 4 pixels"):
        rules.layout((0, 4))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "tiles", "max_tiles": 4}, "belong to dialect internvl"),
        ({"type": "tiles", "dialect": "internvl", "grids": [[1, 2]]}, "belong to dialect llava_next"),
        ({"type": "tiles", "grids": []}, "at least one"),
        ({"type": "tiles", "dialect": "internvl", "min_tiles": 5, "max_tiles": 4}, r"min_tiles \(5\) is more"),
        ({"type": "tiles", "dialect": "llavanext"}, "model.views.dialect"),
        ("tiles", "expected a mapping"),
    ],
)
def test_views_that_do_not_fit_are_told(spec, words):
    with pytest.raises(ConfigError, match=words):
        views_config(spec)


def test_views_are_found_by_name():
    assert set(VIEWS) >= {"single", "tiles"} and views_config(None).type == "single"
    with pytest.raises(UnknownName, match="did you mean 'tiles'"):
        views_config({"type": "tile"})


def test_pixels_travel_under_one_key_per_encoder():
    import pickle

    keys = pickle.loads(pickle.dumps(PixelKeys(["b", "a"])))
    assert dict(keys) == {"b": "pixel_values", "a": "pixel_values_a"} and type(keys) is PixelKeys
    inputs = {"pixel_values": 1, "pixel_values_a": None, "input_ids": 2}
    assert keys.by_encoder(inputs) == {"b": 1} and keys.split(inputs)[1] == {"input_ids": 2}
    assert keys.pop(inputs) == {"b": 1} and inputs == {"input_ids": 2}
    assert keys.by_key({"a": 3}) == {"pixel_values_a": 3}
