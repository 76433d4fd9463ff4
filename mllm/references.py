"""What does a row's entry for a picture refer to: a file, encoded bytes, pixels, stored codes, something remote?"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from mllm.errors import DataError

Kind = Literal["file", "bytes", "pixels", "codes", "remote"]
CODES = re.compile(r"^(.*)codes\.json#(\d+)$")
# How PNG, JPEG, GIF, WebP, TIFF and BMP begin in base64. JPEG's `/9j/` would else be taken for a path.
_BASE64_HEADS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


class Reference(NamedTuple):
    """What an entry means. value: a `Path`, the bytes (or their base64 text), the pixels or codes as given, or the address."""

    kind: Kind
    value: Any

    def encoded(self, where: str) -> bytes:
        """The bytes of a reference to bytes. Raises `DataError` for damaged base64."""
        if isinstance(self.value, bytes):
            return self.value
        try:
            return base64.b64decode("".join(self.value.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{where}: the base64 of a picture is damaged ({error})") from None


def refer(entry: Any, *, where: str, root: Path | None = None) -> Reference:
    """The one reading of a picture's entry, for training, checks and evaluation. Nothing is opened.

    entry: path (relative to ``root``), ``file:`` or base64 ``data:`` URI, base64 text alone, encoded bytes, `datasets`'
    ``{"bytes", "path"}``, ``folder/codes.json#12``, an http address, pixels (PIL image, numpy array) or codes. Raises
    `DataError` that opens with ``where``.
    """
    if isinstance(entry, Mapping):
        inner = entry.get("bytes")
        entry = inner if inner is not None else entry.get("path") or entry.get("url")
        if entry is None:
            raise DataError(f"{where}: an image entry has neither bytes nor path")
    if isinstance(entry, (bytes, bytearray, memoryview)):
        return Reference("bytes", bytes(entry))
    if isinstance(entry, os.PathLike):
        entry = os.fspath(entry)
    if isinstance(entry, str):
        return _text(entry, where, root)
    kind = type(entry).__name__
    if kind in ("Tensor", "VisualCodes"):
        return Reference("codes", entry)
    if kind == "ndarray" or hasattr(entry, "getexif"):
        return Reference("pixels", entry)
    raise DataError(
        f"{where}: cannot read an image from {kind}; give a path, bytes, a data: URI, a PIL image, a numpy array or "
        "{'bytes': …, 'path': …}"
    )


def _text(entry: str, where: str, root: Path | None) -> Reference:
    if not entry.strip():
        raise DataError(f"{where}: an image path is empty")
    if entry.startswith("data:"):
        header, separator, body = entry.partition(",")
        if not separator or not header.endswith(";base64"):
            raise DataError(f"{where}: a data: URI must read data:image/…;base64,… but starts {header[:60]!r}")
        return Reference("bytes", body)
    if entry.startswith(("http://", "https://")):
        return Reference("remote", entry)
    if entry.startswith("file:"):
        entry = file_path(entry, where)
    elif entry.startswith(_BASE64_HEADS) and _BASE64.fullmatch(entry):
        return Reference("bytes", entry)
    try:
        path = Path(entry).expanduser()
    except RuntimeError:  # no such user
        path = Path(entry)
    if root is not None:
        path = root / path
    return Reference("codes", str(path)) if CODES.match(entry) else Reference("file", path)


def file_path(uri: str, where: str) -> str:
    """The path that a ``file:`` URI means, ``%20`` and the like decoded; a file whose name holds them literally wins."""
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise DataError(
            f"{where}: {uri[:200]!r} names a file of another machine ({parts.netloc}); file:///… is expected"
        )
    literal = uri.removeprefix("file:").removeprefix("//").removeprefix("localhost")
    return literal if "%" in literal and Path(literal).exists() else unquote(literal)


def natural_order(path: Path) -> list[Any]:
    """What files sort by so that 10 follows 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]
