"""By what are two pictures the same to an encoder, and what reads one here? (`mllm.pictures` does.)"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from PIL import Image

from mllm.pictures import MAX_PIXELS, ROTATIONS, image_size, load_image, orientation, read_bytes
from mllm.processing.codes import read_codes
from mllm.processing.panels import PANELS
from mllm.processing.pixels import resize, to_pixels, to_pixels_multi

__all__ = [
    "MAX_PIXELS",
    "beside_pixels",
    "image_hash",
    "image_size",
    "load_image",
    "read_bytes",
    "resize",
    "to_pixels",
    "to_pixels_multi",
]


def image_hash(source: Any, *, where: str = "image") -> str:
    """sha256 hex digest of the encoded bytes; of mode, size, pixels and `beside_pixels` for PIL images and of type, shape and values for
    arrays, which have none; of the codes where those are what is stored."""
    if isinstance(source, Image.Image):
        digest = hashlib.sha256(f"{source.mode} {source.size} ".encode())
        digest.update(source.tobytes())
        if beside := beside_pixels(source):
            digest.update(repr(beside).encode())
        return digest.hexdigest()
    if isinstance(source, np.ndarray):
        digest = hashlib.sha256(f"{source.dtype} {source.shape} ".encode())
        digest.update(np.ascontiguousarray(source).tobytes())
        return digest.hexdigest()
    codes = read_codes(source, where=where)
    if codes is not None:
        return hashlib.sha256(codes.numpy().tobytes()).hexdigest()
    return hashlib.sha256(read_bytes(source, where=where)).hexdigest()


def beside_pixels(image: Image.Image) -> dict[str, Any]:
    """What makes a picture be seen otherwise than its mode, size and values say: how it is turned, its colours, what is transparent in
    it, how many panels it has. Two pictures are the same to an encoder only where these are too; an ordinary one has none."""
    found: dict[str, Any] = {key: image.info[key] for key in ("transparency", PANELS) if key in image.info}
    if orientation(image) in ROTATIONS:
        found["orientation"] = orientation(image)
    if image.palette is not None:
        found["palette"] = (image.palette.mode, image.getpalette(None))
    return found
