"""Which pictures may reach the engine, and under which name are they cached?"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from mllm.errors import DataError
from mllm.processing.images import image_size, read_bytes
from mllm.serve.http.content import Picture
from mllm.serve.http.errors import Refused, shown

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.\-]*):")
_DATA = re.compile(r"^data:([^,;]{0,80})((?:;[^,;]{0,80}){0,4});base64,", re.IGNORECASE)
_IMAGE = re.compile(r"^image/[a-z0-9.+\-]{1,40}$")


@dataclass(frozen=True)
class PictureRules:
    """What a picture must be. fetches: whether pictures may be given by address."""

    max_images: int
    max_pixels: int
    fetches: bool


def check_number(pictures: list[Picture], rules: PictureRules) -> None:
    """Raise `Refused` for more pictures than a request may have."""
    if len(pictures) > rules.max_images:
        raise Refused(400, f"{len(pictures)} pictures in one request; at most {rules.max_images} are served")


def write_pictures(pictures: list[Picture], rules: PictureRules, secret: bytes) -> None:
    """Check every picture by its header and write it into the request as it was checked, with our cache name.

    An embedded picture's name is a keyed hash of its bytes: nobody without ``secret`` can name an entry. A picture that
    the engine fetches gets no name here; it is cached by what was fetched. Raises `Refused`.
    """
    for position, picture in enumerate(pictures):
        address = picture.address.strip()
        scheme = _SCHEME.match(address)
        if scheme is None or scheme.group(1).lower() == "data":
            url, content = _embedded(address, position, rules.max_pixels)
            picture.write(url, hashlib.blake2b(content, key=secret, digest_size=32).hexdigest())
        else:
            _check_address(scheme.group(1).lower(), rules.fetches)
            picture.write(address, None)


def _embedded(address: str, position: int, max_pixels: int) -> tuple[str, bytes]:
    """A data URI in its one form, and the bytes in it."""
    found = _DATA.match(address)
    if found is None:
        raise Refused(
            400, f"picture {position}: expected data:<media type>;base64,<data> or an address, got {shown(address)}"
        )
    where = f"picture {position}"
    data = "".join(address[found.end() :].split())
    kind = found.group(1).lower()
    url = f"data:{kind if _IMAGE.match(kind) else 'image/png'};base64,{data}"
    try:
        content = read_bytes(url, where=where)
        height, width = image_size(content, where=where)
    except DataError as error:
        raise Refused(400, str(error)[:300]) from None
    if height * width > max_pixels:
        raise Refused(
            400,
            f"{where} has {width} × {height} pixels, above this server's limit of {max_pixels / 1e6:g} megapixels",
        )
    return url, content


def _check_address(scheme: str, fetches: bool) -> None:
    if scheme not in ("http", "https"):
        raise Refused(400, f"{scheme[:40]}: addresses are not served; send the picture as a base64 data: URI")
    if not fetches:
        raise Refused(400, "this server fetches no addresses; send the picture as a base64 data: URI")


def secret_of(salt: str, owner: str) -> bytes:
    """The key of an owner's cache names: 32 bytes."""
    return hashlib.blake2b(owner.encode(), key=hashlib.sha256(salt.encode()).digest(), digest_size=32).digest()


def cache_salt(secret: bytes, asked: Any) -> str:
    """The salt of a request's prefix cache: the owner's, and what the client added to it. Raises `Refused`."""
    if asked is not None and (not isinstance(asked, str) or not 0 < len(asked) <= 1024):
        raise Refused(400, "cache_salt must be a text of 1 to 1024 characters")
    return hashlib.blake2b((asked or "").encode(), key=secret, digest_size=32, person=b"prefix").hexdigest()
