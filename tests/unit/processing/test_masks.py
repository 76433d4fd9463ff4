"""Are masks read, refused, written and laid on pictures as their formats say?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import DataError
from mllm.processing.mask_files import box_of, decode_rle, draw_polygons, encode_rle, outlines, read_mask
from mllm.processing.segments import SegmentSpec, share_masks
from mllm.types import ImageSpec


def random_masks(number: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        (rng.random((rng.integers(1, 30), rng.integers(1, 30))) < rng.random()).astype(np.uint8) for _ in range(number)
    ]


def test_run_lengths_are_cocos_and_come_back() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    for mask in random_masks(60):
        rle = encode_rle(mask)
        assert rle["counts"] == coco.encode(np.asfortranarray(mask))["counts"].decode()
        assert np.array_equal(decode_rle(rle), mask)
    plain = {"size": [2, 3], "counts": [1, 2, 3]}
    assert decode_rle(plain).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_polygons_inside_a_picture_cover_opencvs_pixels() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(1)
    for _ in range(100):
        high, wide = rng.integers(8, 40, 2)
        points = np.stack([rng.integers(0, wide, 6), rng.integers(0, high, 6)], 1).astype(np.int32)
        wanted = np.zeros((high, wide), np.uint8)
        cv2.polylines(wanted, [points], True, 1, 1)
        cv2.fillPoly(wanted, [points], 1)
        assert np.array_equal(draw_polygons([points], (int(high), int(wide))), wanted)


def test_outlines_filled_by_the_even_odd_rule_give_the_mask_again() -> None:
    ring = np.ones((5, 5), np.uint8)
    ring[2, 2] = 0
    assert len(outlines(ring)) == 2 and outlines(np.zeros((3, 3))) == []
    for mask in random_masks(40):
        rows = np.arange(mask.shape[0])[:, None] + 0.5
        columns = np.arange(mask.shape[1])[None] + 0.5
        inside = np.zeros(mask.shape, int)
        for polygon in outlines(mask):
            points = np.array(polygon).reshape(-1, 2)
            for (x, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
                if x == x1:
                    inside += (rows > min(y0, y1)) & (rows < max(y0, y1)) & (columns < x)
        assert np.array_equal(inside % 2, mask)


def test_every_way_to_write_a_mask_gives_it(tmp_path: Path) -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:7] = 1
    marked = mask.copy()
    marked[5] = 255
    Image.fromarray(marked).save(tmp_path / "m.png")
    Image.fromarray(mask * 7).save(tmp_path / "seven.png")
    Image.fromarray(mask * 255).convert("1").save(tmp_path / "bits.png")
    polygon = [[2, 1, 6, 1, 6, 3, 2, 3]]
    halves = [encode_rle(np.where(np.arange(8) < 5, mask, 0)), encode_rle(np.where(np.arange(8) > 3, mask, 0))]
    for entry in (mask, encode_rle(mask), polygon, halves, str(tmp_path / "bits.png"), Image.fromarray(mask)):
        assert np.array_equal(read_mask(entry, (6, 8), where="x"), mask), entry
    assert np.array_equal(read_mask(str(tmp_path / "m.png"), (6, 8), where="x"), marked)
    seven = {"path": str(tmp_path / "seven.png"), "foreground": 7}
    assert np.array_equal(read_mask(seven, (6, 8), where="x"), mask)
    assert not read_mask(None, (6, 8), where="x").any() and not read_mask([], (6, 8), where="x").any()
    assert box_of(mask) == [2, 1, 5, 3] and box_of(np.zeros((2, 2))) is None


BAD = [
    (np.zeros((6, 9), np.uint8), "9 × 6 pixels and its picture 8 × 6"),
    (np.full((6, 8), 3, np.uint8), "holds the value 3; expected 0, 1 and 255"),
    (np.full((6, 8), 255, np.uint8), "holds 255, pixels that do not count, and no 1"),
    (np.zeros((6, 8, 3), np.uint8), "expected one channel"),
    ({"size": [6, 8], "counts": [10, -5, 43]}, "numbers of pixels, got -5"),
    ([[1, 1, 2, float("nan"), 3, 3]], "got 3, 2 of them finite"),
    ({"size": [6, 8], "counts": [10, 10]}, "run lengths cover 20 pixels, a mask of 6 × 8 has 48"),
    ({"size": [6], "counts": "0"}, "no run lengths as COCO writes them"),
    (np.full((6, 8), 0.7), "holds the value 0.7"),
    ([[0.1, 0.1, 0.5, 0.1, 0.5, 0.9]], "between 0 and 1, as shares of the picture"),
    ([[10, 1, 12, 1, 12, 4]], "beside its picture of 8 × 6"),
    ([[1, 1, 2, 2]], "at least three points"),
    ([[1, 1, 2, 2, 3]], "list of x, y pairs"),
    ("/nowhere/mask.png", "no such image file"),
]


@pytest.mark.parametrize(("entry", "words"), BAD)
def test_a_mask_that_does_not_fit_is_told(entry, words) -> None:
    with pytest.raises(DataError, match=rf"sample 'a', mask 0: .*{words}"):
        read_mask(entry, (6, 8), where="sample 'a', mask 0")


def spec(resize: str) -> SegmentSpec:
    image = ImageSpec(height=64, width=64, resize=resize)
    return SegmentSpec(token="[SEG]", token_id=7, image=image, size=(64, 64), question="Mark {phrase}.")


@pytest.mark.parametrize("resize", ["squash", "letterbox", "crop"])
@pytest.mark.parametrize("size", [(64, 64), (40, 97), (120, 51), (33, 64)])
def test_a_mask_laid_on_an_encoders_view_comes_back_to_its_place(resize, size) -> None:
    mask = np.zeros(size, np.uint8)
    rows, columns = size
    mask[rows // 2 - 8 : rows // 2 + 7, columns // 2 - 10 : columns // 2 + 11] = 1
    laid = spec(resize).lay(mask)
    assert laid.shape == (64, 64) and set(laid.unique().tolist()) <= {0, 1, 255}
    assert bool((laid == 255).any()) == (resize == "letterbox" and size[0] != size[1])
    logits = torch.where(laid == 1, 9.0, -9.0)[None]
    back = (spec(resize).restore(logits, size)[0] > 0).numpy()
    assert (back & (mask == 1)).sum() / (back | (mask == 1)).sum() > 0.88


def test_what_a_crop_does_not_show_is_never_marked() -> None:
    back = spec("crop").restore(torch.full((1, 64, 64), 9.0), (30, 90))[0] > 0
    assert back[:, 31:59].all() and not back[:, :29].any() and not back[:, 61:].any()


def test_marks_and_masks_are_counted_and_those_not_learned_left_out() -> None:
    s = spec("squash")
    texts = [("[SEG] and [SEG]", 1, True), ("[SEG]", 2, False), ("also [SEG]", 2, True)]
    assert share_masks(s, texts, ["a", "b", "c", "d"], where="x") == (["a", "b", "d"], [0, 0, 1])
    with pytest.raises(DataError, match=r"x: the answers hold 4 \[SEG\] and the sample 3 masks"):
        share_masks(s, texts, ["a", "b", "c"], where="x")
    with pytest.raises(DataError, match="stands before any picture"):
        share_masks(s, [("[SEG]", 0, True)], ["a"], where="x")
