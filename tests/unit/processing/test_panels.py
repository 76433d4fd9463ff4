"""Do channels beyond three travel as panels, to the encoders that want them and to no other, and never unseen?"""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import DataError
from mllm.eval.data.pictures import blank
from mllm.processing.images import image_hash, load_image
from mllm.processing.panels import as_panels, number_of_panels, save_panels, stack_channels
from mllm.processing.pixels import to_pixels, to_pixels_multi
from mllm.processing.views.pixels import to_view_pixels
from mllm.types import ImageSpec

RANDOM = np.random.default_rng(0)
BANDS = RANDOM.integers(0, 256, (20, 30, 5), dtype=np.uint8)
TWO = ImageSpec(height=32, width=16, panels=2, resize="squash")
ONE = ImageSpec(height=16, width=16)


def test_five_channels_survive_the_file_and_each_panel_is_resized_by_itself(tmp_path):
    save_panels(stack_channels(BANDS), tmp_path / "bands.png")
    picture = load_image(tmp_path / "bands.png", where="x")
    assert picture.mode == "RGB" and picture.size == (30, 40) and number_of_panels(picture) == 2
    panels = [BANDS[..., :3], np.concatenate([BANDS[..., 3:], np.zeros((20, 30, 1), np.uint8)], axis=2)]
    for resize in ("squash", "letterbox", "crop"):
        for resampler in ("pil", "torch"):
            spec, one = (s.model_copy(update={"resize": resize}) for s in (TWO, ONE))
            want = [to_pixels(Image.fromarray(panel), one, resampler=resampler) for panel in panels]
            assert torch.equal(to_pixels(picture, spec, resampler=resampler), torch.cat(want, dim=1))
    both = to_pixels_multi(picture, {"all": TWO, "colour": ONE})
    assert torch.equal(both["colour"], both["all"][:, :16]), "an ordinary encoder sees the first panel"


def test_colour_and_depth_are_joined_and_what_cannot_be_is_named(tmp_path):
    depth = RANDOM.random((20, 30)).astype(np.float32)
    picture = stack_channels([BANDS[..., :3], depth])
    assert picture.size == (30, 40)
    assert np.array_equal(np.asarray(picture)[20:, :, 0], np.rint(depth * 255).astype(np.uint8))
    for wrong, word in (
        ([BANDS, depth[:5]], "different sizes"),
        (depth * 300, "scale them"),
        (np.zeros((2, 2, 2, 2)), "expected"),
        (np.zeros((3, 48, 64), np.uint8), "expected .H, W, C."),
    ):
        with pytest.raises(DataError, match=word):
            stack_channels(wrong)
    with pytest.raises(DataError, match=r"kept in \.png files"):
        save_panels(picture, tmp_path / "x.jpg")


def test_a_picture_of_too_few_panels_is_refused_and_views_other_than_the_whole_too():
    plain = Image.fromarray(BANDS[..., :3])
    with pytest.raises(DataError, match=r"pictures of 2 panels \(6 channels\), and this one has 1; join"):
        to_pixels(plain, TWO)
    with pytest.raises(DataError, match="seen as a whole only"):
        to_view_pixels(stack_channels(BANDS), {"e": ONE}, {"e": []})
    broken = stack_channels(BANDS)
    broken.info["panels"] = "three"
    with pytest.raises(DataError, match="says it has 'three' panels"):
        to_pixels(broken, ONE)


def test_a_blank_picture_keeps_its_panels():
    assert number_of_panels(blank(stack_channels(BANDS))) == 2
    buffer = io.BytesIO()
    Image.fromarray(BANDS[..., :3]).save(buffer, "PNG")
    assert number_of_panels(load_image(buffer.getvalue(), where="x")) == 1


def test_pictures_of_the_same_values_in_other_panels_turned_otherwise_or_of_other_colours_are_told_apart():
    def of(mode: str = "RGB", **info) -> Image.Image:
        picture = Image.fromarray(BANDS[..., :3]) if mode == "RGB" else Image.fromarray(BANDS[..., 0]).convert(mode)
        picture.info.update(info)
        return picture

    turned, coloured = of(), of("P")
    turned.getexif()[0x0112] = 6
    coloured.putpalette(list(range(255, -1, -1)) * 3)
    seen = [of(), as_panels(of(), 2), as_panels(of(), 4), turned, of(transparency=(1, 2, 3)), of("P"), coloured]
    hashes = [image_hash(picture) for picture in seen]
    assert len(set(hashes)) == len(seen)
    assert hashes[0] == image_hash(of(dpi=(72, 72))), "what nobody sees does not count"
    assert hashes[1] == image_hash(as_panels(of(), 2))
    assert hashes[0] == hashlib.sha256(b"RGB (30, 20) " + of().tobytes()).hexdigest(), "features kept before are found"
