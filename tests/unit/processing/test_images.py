"""Do pictures of every kind become the pixels that the encoders' own preprocessing would make?"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllm.errors import DataError, UnavailableError
from mllm.processing.images import (
    image_hash,
    image_size,
    load_image,
    resize,
    to_pixels,
    to_pixels_multi,
)
from mllm.types import ImageSpec

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-15, 16, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ sources


def test_path_bytes_uri_array_and_datasets_dict_give_the_same_picture(tmp_path):
    picture = photo(40, 30)
    data = encoded(picture)
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    sources = [
        path,
        str(path),
        f"file://{path}",
        data,
        bytearray(data),
        "data:image/png;base64," + base64.b64encode(data).decode(),
        picture,
        np.asarray(picture),
        {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": str(path)},
    ]
    for source in sources:
        loaded = load_image(source, where="s")
        assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    corner = np.zeros((20, 30, 3), np.uint8)
    corner[:10, :10] = 255  # top left in the upright picture
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = Image.fromarray(corner)
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    upright = load_image(data, where="s")
    assert np.array_equal(np.asarray(upright), corner)
    assert image_size(data, where="s") == (20, 30)


@pytest.mark.parametrize("trailing", [False, True])
def test_the_size_of_a_png_is_read_without_decoding_it(trailing, monkeypatch):
    """What turns it may stand behind the pixels, where Pillow looks by decoding; a server asks for sizes before it refuses large ones."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(300, 200), exif=exif)
    if trailing:
        start = data.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        data = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]
    assert load_image(data, where="s").size == (200, 300)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("decoded"))
    assert image_size(data, where="s") == (300, 200)
    assert image_size(encoded(photo(300, 200).convert("L")), where="s") == (200, 300)
    assert image_size(data[: len(data) // 2], where="s") == ((200, 300) if trailing else (300, 200))  # cut before it


def test_alpha_is_laid_on_white_in_every_mode_that_has_it():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, :2] = (200, 0, 0, 255)
    rgba[:, 2:] = (0, 0, 0, 0)
    expected = np.full((4, 4, 3), 255, np.uint8)
    expected[:, :2] = (200, 0, 0)
    image = Image.fromarray(rgba)
    assert np.array_equal(np.asarray(load_image(encoded(image), where="s")), expected)
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert np.asarray(load_image(half, where="s"))[0, 0].tolist() == [127, 127, 127]
    grey = load_image(encoded(Image.new("LA", (2, 2), (10, 0))), where="s")
    assert np.asarray(grey)[0, 0].tolist() == [255, 255, 255]
    palette = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    hidden = palette.getpixel((3, 0))
    shown = np.asarray(load_image(encoded(palette, transparency=hidden), where="s"))
    assert shown[0, 0].tolist() == [200, 0, 0] and shown[0, 3].tolist() == [255, 255, 255]
    keyed = encoded(image.convert("RGB"), transparency=(0, 0, 0))
    assert np.array_equal(np.asarray(load_image(keyed, where="s")), expected)


def test_palette_grey_bilevel_and_cmyk_become_rgb():
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    for mode in ("P", "CMYK"):
        data = encoded(picture.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
        assert np.abs(np.asarray(load_image(data, where="s")).astype(int) - (255, 0, 0)).max() <= 1, mode
    jpeg = load_image(encoded(picture.convert("CMYK"), "JPEG", quality=95), where="s")
    assert np.abs(np.asarray(jpeg).astype(int) - (255, 0, 0)).max() <= 4
    assert np.asarray(load_image(encoded(Image.new("1", (4, 4), 1)), where="s")).min() == 255
    assert np.asarray(load_image(encoded(Image.new("L", (4, 4), 77)), where="s"))[0, 0].tolist() == [77] * 3


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, 0)
    expected = ((ramp.astype(int) + 128) // 257)[..., None].repeat(3, -1)
    for format in ("PNG", "TIFF", "PPM"):
        loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), format), where="s"))
        assert np.array_equal(loaded, expected), format
    assert np.array_equal(np.asarray(load_image(ramp, where="s")), expected)


def test_float_and_bool_arrays_are_scaled_and_others_refused():
    assert np.asarray(load_image(np.full((2, 2, 3), 0.5), where="s"))[0, 0].tolist() == [128] * 3
    assert np.asarray(load_image(np.ones((2, 2), bool), where="s")).min() == 255
    for bad in (
        np.full((2, 2, 3), 2.0),
        np.full((2, 2), np.nan),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((2, 2), np.int64),
    ):
        with pytest.raises(DataError, match=r"^s: "):
            load_image(bad, where="s")


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0],
            format,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if format == "WEBP" else {}),
        )
        assert np.asarray(load_image(data, where="s"))[0, 0].tolist() == [255, 0, 0], format


def test_bad_pictures_raise_one_error_that_names_the_place(tmp_path):
    data = encoded(photo(64, 64), "JPEG")
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    truncated = tmp_path / "cut.jpg"
    truncated.write_bytes(data[: len(data) // 2])
    empty = tmp_path / "empty.png"
    empty.touch()
    cases = {
        "does not decode": truncated,
        "not an image": text,
        "empty": empty,
        "no such image file": tmp_path / "none.png",
        "cannot be read": tmp_path,
        "damaged": "data:image/png;base64,@@@",
        "must read": "data:image/png,abc",
        "remote": "https://example.org/a.png",
        "no pixels": np.zeros((0, 5, 3), np.uint8),
        "neither bytes nor path": {"bytes": None, "path": None},
        "cannot read an image from int": 7,
        "not a path": "a\0b.png",
        "channels last": torch.zeros(3, 8, 8, dtype=torch.uint8),
    }
    for message, source in cases.items():
        with pytest.raises(DataError, match=f"^sample 'x' of d: .*{message}"):
            load_image(source, where="sample 'x' of d")
    with pytest.raises(DataError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)), where="s")
    for source in (truncated, text, empty, tmp_path / "none.png"):  # where the place is the file, it is said once
        with pytest.raises(DataError) as caught:
            load_image(source, where=str(source))
        assert str(caught.value).count(str(source)) == 1


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    data = encoded(Image.new("1", (12_000, 9_000)))  # 108 megapixels in a few kilobytes
    assert len(data) < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"s: .*12000 × 9000 = 108\.0 megapixels, above the limit of 100"):
        load_image(data, where="s")
    monkeypatch.undo()
    assert load_image(data, where="s", max_pixels=200_000_000).size == (12_000, 9_000)
    with pytest.raises(DataError, match=r"above the limit of 0\.001"):
        load_image(photo(50, 50), where="s", max_pixels=1000)


def test_a_text_in_a_png_that_unpacks_to_too_much_is_called_that():
    """It was said to be of no supported format."""
    notes = PngInfo()
    notes.add_text("note", "a" * 2**21, zip=True)
    file = io.BytesIO()
    photo(8, 8).save(file, "PNG", pnginfo=notes)
    with pytest.raises(DataError, match=r"^s: .*cannot be read \(Decompressed data too large"):
        load_image(file.getvalue(), where="s")


def test_postscript_is_not_opened():
    with pytest.raises(DataError, match="supported format"):
        load_image(encoded(photo(8, 8), "EPS"), where="s")


def test_hash_is_of_the_bytes_or_of_the_pixels(tmp_path):
    data = encoded(photo(9, 9))
    (tmp_path / "p.png").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert image_hash(data) == image_hash(tmp_path / "p.png") == image_hash({"bytes": data}) == expected
    assert image_hash(photo(9, 9)) == image_hash(photo(9, 9)) != image_hash(photo(9, 9, seed=1))


# ------------------------------------------------------------------------------------------------------------- pixels

SIZES = [(640, 480), (480, 640), (333, 517), (224, 224), (40, 31), (225, 224), (901, 77)]


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_clips_own_processor(size):
    image = photo(*size)
    reference = CLIPImageProcessorPil(size={"shortest_edge": 224})(image, return_tensors="pt")["pixel_values"][0]
    spec = ImageSpec(height=224, width=224, mean=CLIP_MEAN, std=CLIP_STD, resize="crop")
    assert (to_pixels(image, spec) - reference).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_squash_equals_siglips_own_processor(size):
    image = photo(*size)
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC)
    reference = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (to_pixels(image, ImageSpec(height=384, width=384)) - reference).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_letterbox_equals_llavas_pad(size):
    image = photo(*size)
    processor = LlavaImageProcessorPil(do_pad=True, size={"height": 336, "width": 336}, do_center_crop=False)
    reference = processor(image, return_tensors="pt")["pixel_values"][0]
    spec = ImageSpec(height=336, width=336, mean=CLIP_MEAN, std=CLIP_STD, resize="letterbox")
    assert (to_pixels(image, spec) - reference).abs().max() <= 1e-6


def test_torch_resampler_equals_the_torchvision_processor_and_is_close_to_pil():
    from transformers import CLIPImageProcessor

    image = photo(640, 480)
    spec = ImageSpec(height=224, width=224, mean=CLIP_MEAN, std=CLIP_STD, resize="crop")
    reference = CLIPImageProcessor(size={"shortest_edge": 224})(image, return_tensors="pt")["pixel_values"][0]
    assert (to_pixels(image, spec, resampler="torch") - reference).abs().max() <= 1e-6
    for mode in ("squash", "letterbox", "crop"):
        spec = ImageSpec(height=336, width=336, resize=mode)
        exact = resize(image, spec).astype(int)
        fast = resize(image, spec, resampler="torch").astype(int)
        assert np.abs(exact - fast).max() <= 2 and (exact != fast).mean() < 0.01
    with pytest.raises(UnavailableError, match="lanczos"):
        resize(image, ImageSpec(height=10, width=10, interpolation="lanczos"), resampler="torch")


def test_letterbox_and_crop_to_a_target_that_is_not_square():
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    boxed = resize(image, ImageSpec(height=80, width=40, resize="letterbox", interpolation="nearest", mean=(0, 0, 0)))
    assert boxed.shape == (80, 40, 3)
    red = (boxed == (255, 0, 0)).all(-1)
    assert red.all(1).sum() == 20 and red[30:50].all()
    cropped = resize(photo(100, 50), ImageSpec(height=80, width=40, resize="crop"))
    assert cropped.shape == (80, 40, 3)


@pytest.mark.parametrize("mode", ["squash", "letterbox", "crop"])
@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (1, 1)])
@pytest.mark.parametrize("resampler", ["pil", "torch"])
def test_extreme_shapes_stay_small_and_finite(mode, size, resampler):
    spec = ImageSpec(height=32, width=48, resize=mode)
    pixels = to_pixels(Image.new("RGB", size, (255, 128, 0)), spec, resampler=resampler)
    assert pixels.shape == (3, 32, 48) and pixels.isfinite().all()


def test_the_thrifty_crop_of_a_strip_is_within_two_of_the_full_one(monkeypatch):
    monkeypatch.setattr("mllm.processing.pixels._MAX_CANVAS", 100_000)
    strip = photo(4000, 30)
    spec = ImageSpec(height=64, width=64, resize="crop")
    full = strip.resize((int(64 * 4000 / 30), 64), Image.Resampling.BICUBIC)
    left = (full.width - 64) // 2
    expected = np.asarray(full.crop((left, 0, left + 64, 64))).astype(int)
    assert np.abs(resize(strip, spec).astype(int) - expected).max() <= 2


def test_several_encoders_share_a_resize_and_get_their_own_values(monkeypatch):
    image = photo(100, 90)
    specs = {
        "semantic": ImageSpec(height=56, width=56, mean=CLIP_MEAN, std=CLIP_STD),
        "spatial": ImageSpec(height=56, width=56),
        "detail": ImageSpec(height=64, width=64, resize="letterbox"),
    }
    calls = []
    original = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    pixels = to_pixels_multi(image, specs)
    assert len(calls) == 1 + 2 and list(pixels) == list(specs)  # one squash, and the letterbox's two passes
    monkeypatch.undo()
    fast = to_pixels_multi(image, specs, resampler="torch")
    for name, spec in specs.items():
        assert torch.equal(pixels[name], to_pixels(image, spec))
        assert torch.equal(fast[name], to_pixels(image, spec, resampler="torch"))


@pytest.mark.parametrize("pieces", ["one", "several", "without pyarrow"])
def test_a_pictures_own_memory_is_read_where_it_can_be_and_gives_the_same_bits(pieces: str, monkeypatch: Any) -> None:
    """As a copy of its values does, whatever way of resizing; the picture stays as it is."""
    from mllm.processing import pixels

    size = (2400, 1900) if pieces == "several" else (97, 61)
    image = photo(*size)
    before = image.tobytes()
    if pieces == "without pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    values = pixels.values_of(image)
    assert values.shape[2] == (4 if pieces == "one" else 3) and (values[..., :3] == np.array(image)).all()
    specs = {
        f"{way} {side}": ImageSpec(height=side, width=side, resize=way, interpolation="bicubic")  # type: ignore[arg-type]
        for way in ("squash", "letterbox", "crop")
        for side in (24, 61)
    }
    specs["as it is"] = ImageSpec(height=size[1], width=size[0])
    found = pixels.to_pixels_multi(image, specs, resampler="torch")
    monkeypatch.setattr(pixels, "values_of", np.array)
    wanted = pixels.to_pixels_multi(image, specs, resampler="torch")
    assert all(torch.equal(found[name], wanted[name]) for name in specs)
    assert image.tobytes() == before
