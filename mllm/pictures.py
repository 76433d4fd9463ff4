"""How does any picture a user has become a decoded, upright RGB image?"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from mllm.errors import DataError, MissingFile
from mllm.references import refer

MAX_PIXELS = 100_000_000
"""Default limit on width × height, read from the header before anything is decoded."""

# Raster formats whose decoders run in process. PIL would also open EPS (runs Ghostscript) and WMF; a picture in a data
# set must not start programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA")

_PIXELS = (b"IDAT", b"fdAT", b"acTL", b"fcTL", b"IEND")
"""Chunks of a PNG that hold or announce pixels, and the last one."""
ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Any, *, where: str, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """The picture as a decoded 8-bit RGB image, upright.

    source: path, ``file:`` or base64 ``data:`` URI, base64 text, encoded bytes, PIL image, numpy array (H, W), (H, W, 1|3|4) of
    uint8, uint16, bool or float in [0, 1], or `datasets`' ``{"bytes", "path"}``. The EXIF orientation is applied, alpha
    is laid on white, 16 bits are scaled to 8, and of an animation the first frame is taken. ``where`` (sample id, file,
    field) opens every error. Raises `DataError` for what is missing, truncated, empty, not an image, or larger than
    ``max_pixels`` (None: no limit).
    """
    if isinstance(source, Image.Image):
        image = source
        _check_size(image, where, max_pixels)
    elif isinstance(source, np.ndarray):
        image = _from_array(source, where)
        _check_size(image, where, max_pixels)
    else:
        image = _open(source, where, max_pixels)
    try:
        if image.mode != "RGB" or "transparency" in image.info:
            rotated = upright(image)
            return _to_rgb(rotated, where)
        image.load()
        return upright(image)
    except DataError:
        raise
    except Exception as error:  # decoders of foreign files raise whatever they like
        raise DataError(f"{_named(source, where)} does not decode: {_reason(error)}") from error


def image_size(source: Any, *, where: str) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation, from the header where the source is a file or bytes."""
    if isinstance(source, np.ndarray):
        return int(source.shape[0]), int(source.shape[1])
    image = source if isinstance(source, Image.Image) else _open(source, where, None)
    turned = orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def read_bytes(source: Any, *, where: str) -> bytes:
    """The encoded file behind a path, URI, bytes or ``{"bytes", "path"}``. Raises `DataError` opening with
    ``where``."""
    reference = refer(source, where=where)
    if reference.kind == "bytes":
        return reference.encoded(where)
    if reference.kind == "remote":
        raise MissingFile(
            f"{where}: {_shown(source)} is remote; download it and give the local path (nothing is fetched in training)"
        )
    if reference.kind == "codes" and getattr(source, "ndim", 1) > 1:
        raise DataError(
            f"{where}: a torch tensor of shape {tuple(source.shape)} is not read as a picture; give a PIL image, or an array with channels "
            "last: tensor.permute(1, 2, 0).numpy()"
        )
    if reference.kind == "codes":
        raise DataError(
            f"{where}: {_shown(source)} names stored codes where pixels are needed; give the picture itself"
        )
    if reference.kind == "pixels":
        raise DataError(f"{where}: {type(source).__name__} holds pixels and no encoded file")
    path: Path = reference.value
    try:
        return path.read_bytes()
    except FileNotFoundError:
        named = "" if str(path) in where else f": {_shown(str(path))}"
        raise MissingFile(f"{where}: no such image file{named}") from None
    except OSError as error:
        raise DataError(f"{where}: image file {_shown(str(path))} cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL inside the path
        raise DataError(f"{where}: {_shown(source)} is not a path ({error})") from None


def _open(source: Any, where: str, max_pixels: int | None) -> Image.Image:
    data = read_bytes(source, where=where)
    if not data:
        raise DataError(f"{_named(source, where)} is empty (0 bytes); copy it again")
    Image.init()  # before it PIL knows five formats, and an unknown one is a KeyError (as MPO is: JPEG reads it)
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{_named(source, where)}: {error} Raise PIL.Image.MAX_IMAGE_PIXELS too if it is meant."
        ) from None
    except UnidentifiedImageError as error:
        raise DataError(
            f"{_named(source, where)} is not an image of a supported format ({', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # of a known format, and odd: a text in it that unpacks to too much
        raise DataError(
            f"{_named(source, where)} cannot be read ({str(error)[:200] or type(error).__name__})"
        ) from error
    _check_size(image, where, max_pixels, source)
    return image


def _check_size(image: Image.Image, where: str, max_pixels: int | None, source: Any = None) -> None:
    width, height = image.size
    shown = _shown(source) if source is not None else "the image"
    if width * height == 0:
        raise DataError(f"{where}: {shown} has no pixels ({width} × {height})")
    if max_pixels is not None and width * height > max_pixels:
        raise DataError(
            f"{where}: {shown} has {width} × {height} = {width * height / 1e6:.1f} megapixels, above the limit of "
            f"{max_pixels / 1e6:g}; scale it down or raise max_pixels"
        )


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise DataError(
            f"{where}: an array of shape {shape} is not an image; expected (H, W) or (H, W, 1|3|4), channels last"
        )
    if array.size == 0:
        raise DataError(f"{where}: the image has no pixels (shape {shape})")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _to_8_bits(array)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise DataError(f"{where}: float pixels must lie in [0, 1], found {array.min():g} to {array.max():g}")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(
            f"{where}: pixels of type {array.dtype} are not supported; use uint8, uint16, bool or float in [0, 1]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def orientation(image: Image.Image) -> int:
    """How a picture is turned, by its EXIF block: 1 to 8, 1 where none says it."""
    file = getattr(image, "fp", None)
    try:
        if image.format == "PNG" and isinstance(
            file, io.BytesIO
        ):  # Pillow would decode it to see what stands behind the pixels
            with Image.open(io.BytesIO(_without_pixels(file.getvalue())), formats=["PNG"]) as described:
                return int(Image.Image.getexif(described).get(0x0112, 1))
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block does not spoil the picture
        return 1


def _without_pixels(png: bytes) -> bytes:
    """A PNG file with what it says of itself, before and behind its pixels, and without these (and without frames)."""
    kept, place = [png[:8]], 8
    while place + 12 <= len(png):
        stop = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in _PIXELS and stop <= len(png):
            kept.append(png[place:stop])
        place = stop
    return b"".join([*kept, b"\0\0\0\0IEND\xaeB`\x82"])


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; itself where that says nothing."""
    rotation = ROTATIONS.get(orientation(image))
    if rotation is None:
        return image
    turned = image.transpose(rotation)
    turned.info.clear()  # the orientation too: whoever opens this picture once more must not turn it again
    if "transparency" in image.info:
        turned.info["transparency"] = image.info["transparency"]
    return turned


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    mode = image.mode
    if getattr(image, "is_animated", False):
        image = next(ImageSequence.Iterator(image))
    if mode.startswith("I") or mode == "F":
        return _grey_to_rgb(image, where)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode == "LAB":
        from PIL import ImageCms

        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Modes I;16, I and F: PIL's own conversion clips at 255, which turns most of a 16-bit picture white."""
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise DataError(f"{where}: float pixels hold NaN or infinity")
        top = float(values.max())
        scaled = values * (255 if top <= 1 else 1 if top <= 255 else 255 / top)
        grey = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    elif values.max(initial=0) > 65535:
        grey = np.rint(values.clip(0) * (255 / float(values.max()))).astype(np.uint8)
    else:
        grey = _to_8_bits(values.clip(0))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey = np.where(values == hidden, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _named(source: Any, where: str) -> str:
    """``where`` and the source, which is said once where both are the same file."""
    shown = _shown(source)
    return where if shown.strip("'\"") in where else f"{where}: {shown}"


def _shown(source: Any) -> str:
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a picture of {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        return repr(text) if len(text) <= 200 else f"{text[:60]!r}… ({len(text)} characters)"
    return "the image"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text else type(error).__name__
