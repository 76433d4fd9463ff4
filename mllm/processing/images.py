"""How does any picture a user has become the pixels an encoder expects?"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.types import ImageSpec

MAX_PIXELS = 100_000_000
"""Default limit on width × height, read from the header before anything is decoded."""

# Raster formats whose decoders run in process. PIL would also open EPS (runs Ghostscript) and WMF; a picture in a data set
# must not start programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA")

Resampler = Literal["pil", "torch"]
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_CANVAS = 64_000_000
_MAX_EXCESS = 32
"""A crop resizes to at most so many times the area it keeps before it takes the thrifty path."""


def load_image(source: Any, *, where: str, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """The picture as a decoded 8-bit RGB image, upright.

    source: path, ``file://`` or base64 ``data:`` URI, encoded bytes, PIL image, numpy array (H, W), (H, W, 1|3|4) of uint8,
    uint16, bool or float in [0, 1], or `datasets`' ``{"bytes", "path"}``. The EXIF orientation is applied, alpha is laid on
    white, 16 bits are scaled to 8, and of an animation the first frame is taken. ``where`` (sample id, file, field) opens
    every error. Raises `DataError` for what is missing, truncated, empty, not an image, or larger than ``max_pixels``
    (None: no limit).
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
            rotated = _upright(image)
            return _to_rgb(rotated, where)
        image.load()
        return _upright(image)
    except DataError:
        raise
    except Exception as error:  # decoders of foreign files raise whatever they like
        raise DataError(f"{where}: {_shown(source)} does not decode: {_reason(error)}") from error


def image_size(source: Any, *, where: str) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation, from the header where the source is a file or bytes."""
    if isinstance(source, np.ndarray):
        return int(source.shape[0]), int(source.shape[1])
    image = source if isinstance(source, Image.Image) else _open(source, where, None)
    turned = _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def image_hash(source: Any, *, where: str = "image") -> str:
    """sha256 hex digest of the encoded bytes; of mode, size and pixels for PIL images and arrays, which have none."""
    if isinstance(source, Image.Image):
        digest = hashlib.sha256(f"{source.mode} {source.size} ".encode())
        digest.update(source.tobytes())
        return digest.hexdigest()
    if isinstance(source, np.ndarray):
        digest = hashlib.sha256(f"{source.dtype} {source.shape} ".encode())
        digest.update(np.ascontiguousarray(source).tobytes())
        return digest.hexdigest()
    return hashlib.sha256(read_bytes(source, where=where)).hexdigest()


def read_bytes(source: Any, *, where: str) -> bytes:
    """The encoded file behind a path, URI, bytes or ``{"bytes", "path"}``. Raises `DataError` opening with ``where``."""
    if isinstance(source, Mapping):
        inner = source.get("bytes")
        source = inner if inner is not None else source.get("path")
        if source is None:
            raise DataError(f"{where}: an image entry has neither bytes nor path")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        raise DataError(
            f"{where}: cannot read an image from {type(source).__name__}; give a path, bytes, a data: URI, a PIL image, "
            "a numpy array or {'bytes': …, 'path': …}"
        )
    if source.startswith("data:"):
        header, separator, body = source.partition(",")
        if not separator or not header.endswith(";base64"):
            raise DataError(f"{where}: a data: URI must read data:image/…;base64,… but starts {header[:60]!r}")
        try:
            return base64.b64decode("".join(body.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{where}: the base64 of a data: URI is damaged ({error})") from None
    if source.startswith(("http://", "https://")):
        raise DataError(
            f"{where}: {_shown(source)} is remote; download it and give the local path (nothing is fetched in training)"
        )
    path = Path(source.removeprefix("file://")).expanduser()
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{where}: no such image file: {_shown(str(path))}") from None
    except OSError as error:
        raise DataError(f"{where}: image file {_shown(str(path))} cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL inside the path
        raise DataError(f"{where}: {_shown(source)} is not a path ({error})") from None


def _open(source: Any, where: str, max_pixels: int | None) -> Image.Image:
    data = read_bytes(source, where=where)
    if not data:
        raise DataError(f"{where}: {_shown(source)} is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{where}: {_shown(source)}: {error} Raise PIL.Image.MAX_IMAGE_PIXELS too if it is meant."
        ) from None
    except Exception as error:
        raise DataError(
            f"{where}: {_shown(source)} is not an image of a supported format ({', '.join(FORMATS)})"
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


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block does not spoil the picture
        return 1


def _upright(image: Image.Image) -> Image.Image:
    rotation = _ROTATIONS.get(_orientation(image))
    if rotation is None:
        return image
    turned = image.transpose(rotation)
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


# ---------------------------------------------------------------------------------------------------------------- pixels


def resize(image: Image.Image, spec: ImageSpec, *, resampler: Resampler = "pil") -> np.ndarray:
    """RGB image → uint8 ``(spec.height, spec.width, 3)`` as ``spec.resize`` and ``spec.interpolation`` say.

    crop is Hugging Face's CLIP preprocessing (shorter side to size, centre crop), squash its SigLIP preprocessing, letterbox
    LLaVA's ``pad`` (mean colour around the picture up to the target's aspect ratio, then one resize). ``pil`` equals their
    PIL backends bit for bit; ``torch`` their torchvision backends, ≤ 2 of 255 away from PIL in < 1 % of the values and about
    four times as fast.
    """
    if image.mode != "RGB":
        raise ConfigError(f"resize takes an RGB image, got mode {image.mode}; use load_image")
    if spec.resize == "squash":
        return _resample(image, (spec.width, spec.height), spec, resampler)
    return (_crop if spec.resize == "crop" else _letterbox)(image, spec, resampler)


def to_pixels(
    image: Image.Image, spec: ImageSpec, dtype: torch.dtype = torch.float32, *, resampler: Resampler = "pil"
) -> Tensor:
    """RGB image → ``(3, H, W)`` of one encoder: normalised floats, or with ``torch.uint8`` the resized pixels themselves, to
    be normalised on the device by `normalize` (four times less to transfer)."""
    return _finish(resize(image, spec, resampler=resampler), spec, dtype)


def to_pixels_multi(
    image: Image.Image,
    specs: Mapping[str, ImageSpec],
    dtype: torch.dtype = torch.float32,
    *,
    resampler: Resampler = "pil",
) -> dict[str, Tensor]:
    """``{name: (3, H, W)}`` for several encoders; specs that resize alike share the work."""
    resized: dict[tuple, np.ndarray] = {}
    result = {}
    for name, spec in specs.items():
        colour = _pad_colour(spec) if spec.resize == "letterbox" else None
        key = (spec.height, spec.width, spec.resize, spec.interpolation, colour)
        if key not in resized:
            resized[key] = resize(image, spec, resampler=resampler)
        result[name] = _finish(resized[key], spec, dtype)
    return result


def normalize(pixels: Tensor, spec: ImageSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 ``(…, 3, H, W)`` on any device → ``(x / 255 - mean) / std`` in ``dtype``, computed in float32."""
    scale, shift = _affine(spec)
    scale, shift = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (scale, shift))
    return pixels.to(torch.float32).mul_(scale).add_(shift).to(dtype)


def _finish(array: np.ndarray, spec: ImageSpec, dtype: torch.dtype) -> Tensor:
    planes = torch.from_numpy(array).permute(2, 0, 1)
    if dtype == torch.uint8:
        return planes.contiguous()
    scale, shift = (torch.tensor(v).view(3, 1, 1) for v in _affine(spec))
    floats = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.mul_(scale).add_(shift).to(dtype)


def _affine(spec: ImageSpec) -> tuple[list[float], list[float]]:
    return [1 / (255 * s) for s in spec.std], [-m / s for m, s in zip(spec.mean, spec.std, strict=True)]


def _pad_colour(spec: ImageSpec) -> tuple[int, int, int]:
    r, g, b = (int(channel * 255) for channel in spec.mean)
    return r, g, b


def _resample(
    image: Image.Image,
    size: tuple[int, int],
    spec: ImageSpec,
    resampler: Resampler,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """(width, height) → uint8 ``(height, width, 3)``; writable."""
    if resampler == "pil":
        return np.array(image.resize(size, RESAMPLING[spec.interpolation], box=box))
    assert box is None
    if spec.interpolation not in ("bicubic", "bilinear"):
        raise UnavailableError(f"the torch resampler has no {spec.interpolation} for CPU images; use resampler='pil'")
    return _torch_resample(np.array(image), size, spec)


def _torch_resample(array: np.ndarray, size: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    if array.shape[:2] == size[::-1]:
        return array
    planes = torch.from_numpy(array).permute(2, 0, 1)[None]  # channels-last strides select torch's fast kernel
    resized = F.interpolate(planes, size[::-1], mode=spec.interpolation, antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def _crop(image: Image.Image, spec: ImageSpec, resampler: Resampler) -> np.ndarray:
    width, height = image.size
    # The shorter side decides; a target that is not square is covered by the smallest picture that contains it.
    if spec.height == spec.width:
        short = spec.height
        wide = width > height
        target_w, target_h = (int(short * width / height), short) if wide else (short, int(short * height / width))
    else:
        scale = max(spec.width / width, spec.height / height)
        target_w, target_h = max(spec.width, round(width * scale)), max(spec.height, round(height * scale))
    left, top = (target_w - spec.width) // 2, (target_h - spec.height) // 2
    if resampler == "torch":
        full = _resample(image, (target_w, target_h), spec, resampler)
        return np.ascontiguousarray(full[top : top + spec.height, left : left + spec.width])
    if target_w * target_h <= _MAX_EXCESS * spec.width * spec.height:
        full = image.resize((target_w, target_h), RESAMPLING[spec.interpolation])
        return np.array(full.crop((left, top, left + spec.width, top + spec.height)))
    # A thin strip would become huge before the crop (1 × 100 000 → 5 gigapixels): resample only what survives it. PIL keeps
    # box coordinates in float32, so this path can be 1 or 2 of 255 away from the long one.
    x, y = width / target_w, height / target_h
    right, bottom = min((left + spec.width) * x, width), min((top + spec.height) * y, height)
    return _resample(image, (spec.width, spec.height), spec, resampler, (left * x, top * y, right, bottom))


def _letterbox(image: Image.Image, spec: ImageSpec, resampler: Resampler) -> np.ndarray:
    width, height = image.size
    if width * spec.height >= height * spec.width:
        canvas_w, canvas_h = width, max(height, round(width * spec.height / spec.width))
    else:
        canvas_w, canvas_h = max(width, round(height * spec.width / spec.height)), height
    if (canvas_w, canvas_h) == (width, height):
        return _resample(image, (spec.width, spec.height), spec, resampler)
    left, top = (canvas_w - width) // 2, (canvas_h - height) // 2
    colour = _pad_colour(spec)
    if resampler == "pil" and spec.interpolation != "nearest":
        # PIL resamples rows first. Padding above and below is constant along rows, so a wide picture's rows can be
        # resampled before the padding exists: the same bits with less work. A tall picture is done so only when the
        # canvas would be huge; then the order of the two passes moves a value by at most 1.
        if canvas_w == width:
            image = image.resize((spec.width, height), RESAMPLING[spec.interpolation])
            canvas_w, left = spec.width, 0
        elif canvas_w * canvas_h > _MAX_CANVAS:
            image = image.resize((width, spec.height), RESAMPLING[spec.interpolation])
            canvas_h, top = spec.height, 0
    canvas = Image.new("RGB", (canvas_w, canvas_h), colour)
    canvas.paste(image, (left, top))
    return _resample(canvas, (spec.width, spec.height), spec, resampler)
