"""Which pictures and videos may reach the engine, and under which name are they cached?"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Any

from mllm.errors import DataError
from mllm.processing.engine_videos import pack
from mllm.processing.images import image_size, read_bytes
from mllm.processing.mask_files import decode_rle
from mllm.processing.videos import open_video
from mllm.serve.http.content import Picture
from mllm.serve.http.errors import Refused, shown
from mllm.types import Video, scene

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.\-]*):")
_DATA = re.compile(r"^data:([^,;]{0,80})((?:;[^,;]{0,80}){0,4});base64,", re.IGNORECASE)
_IMAGE = re.compile(r"^image/[a-z0-9.+\-]{1,40}$")
_VIDEO = "video/mp4"
"""Media type of every video that is handed on: what it is its own bytes say, and vLLM reads one type by other rules."""


@dataclass(frozen=True)
class PictureRules:
    """What a picture must be. max_videos, max_seconds: of a model that takes videos, how many (scenes among them) and how long; max_frames:
    pictures of a scene; timed: whether each of them must say when it was taken; whole: whether a video may have no more frames than that
    either, since what would choose among them does not come with a request; domains: hosts whose pictures may be given by address;
    max_bytes, timeout (seconds): of one that is fetched."""

    max_images: int
    max_pixels: int
    max_videos: int = 0
    max_seconds: float = 0.0
    domains: frozenset[str] = frozenset()
    max_bytes: int = 32 * 2**20
    timeout: float = 5.0
    max_frames: int = 0
    timed: bool = False
    whole: bool = False


def check_number(pictures: list[Picture], rules: PictureRules) -> None:
    """Raise `Refused` for more pictures than a request may have."""
    stills, videos = sum(not picture.is_video for picture in pictures), sum(picture.is_video for picture in pictures)
    if stills > rules.max_images:
        raise Refused(
            400, f"{stills} pictures in one request; at most {rules.max_images} are served (mllm serve --max-images)"
        )
    if videos > rules.max_videos:
        kind = "videos and scenes" if any(picture.views for picture in pictures) else "videos"
        raise Refused(
            400, f"{videos} {kind} in one request; at most {rules.max_videos} are served (mllm serve --max-videos)"
        )
    for picture in pictures:
        if len(picture.views) > rules.max_frames:
            raise Refused(
                400, f"a scene of {len(picture.views)} pictures; this model sees at most {rules.max_frames} of one"
            )


def singly(pictures: list[Picture]) -> list[Picture]:
    """The pictures and videos of a request, each picture of a scene by itself."""
    return [one for picture in pictures for one in (picture.views or [picture])]


async def fetch_pictures(pictures: list[Picture], rules: PictureRules) -> None:
    """Put what stands behind every address in its place, as a data URI. Raises `Refused`.

    Fetched here and not by the engine: one reader of addresses, one limit of time and size, and the picture is judged and named
    as an embedded one. No redirect is followed, since it could lead to any host.
    """
    found = [
        (place, picture) for place, picture in enumerate(singly(pictures)) if _scheme_of(picture.address) != "data"
    ]
    for _, picture in found:
        _check_address(picture.address.strip(), rules)
    if not found:
        return
    import httpx

    async with httpx.AsyncClient(timeout=rules.timeout, follow_redirects=False) as client:
        bodies = await asyncio.gather(*(_fetched(client, picture, place, rules) for place, picture in found))
    for (_, picture), body in zip(found, bodies):
        kind = _VIDEO if picture.is_video else "image/png"
        picture.address = f"data:{kind};base64,{base64.b64encode(body).decode()}"


async def _fetched(client: Any, picture: Picture, place: int, rules: PictureRules) -> bytes:
    import httpx

    body, where = bytearray(), f"picture {place}"
    try:
        async with asyncio.timeout(rules.timeout):  # of the whole, where httpx's own is of every step
            async with client.stream(
                "GET", picture.address.strip(), headers={"accept-encoding": "identity"}
            ) as response:
                if response.is_redirect:
                    raise Refused(
                        400, f"{where}: the host answers with a redirect, which is not followed; send that address"
                    )
                if response.status_code != 200:
                    raise Refused(400, f"{where}: the host answers with status {response.status_code}")
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) > rules.max_bytes:
                        raise Refused(400, f"{where}: above the limit of {rules.max_bytes} bytes")
    except (TimeoutError, httpx.TimeoutException):
        raise Refused(400, f"{where}: the host did not send it within {rules.timeout:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Refused(400, f"{where}: it cannot be fetched ({type(error).__name__})") from None
    return bytes(body)


def write_pictures(pictures: list[Picture], rules: PictureRules, secret: bytes) -> None:
    """Check every picture (`fetch_pictures` was before) by its header and write it into the request as it was checked, with our
    cache name: a keyed hash of its bytes, so that nobody without ``secret`` can name an entry. Raises `Refused`."""
    position = 0
    for picture in pictures:
        url, content = _scene(picture, position, rules) if picture.views else _embedded(picture, position, rules)
        position += len(picture.views) or 1
        picture.file = content
        if picture.mask is not None:
            _check_mask(
                picture.mask, image_size(content, where=f"picture {position - 1}"), f"picture {position - 1}, mask"
            )
        picture.write(url, hashlib.blake2b(content, key=secret, digest_size=32).hexdigest())


def _scene(whole: Picture, position: int, rules: PictureRules) -> tuple[str, bytes]:
    """The pictures of a scene as one video, of which every one is seen (`mllm.types.scene`): its data URI, and the bytes in it."""
    files, first = [], None
    for number, view in enumerate(whole.views):
        files.append(_embedded(view, position + number, rules)[1])
        size = image_size(files[-1], where=f"picture {position + number}")
        first = first or size
        if size != first:
            raise Refused(
                400,
                f"picture {position + number} is {size[1]} × {size[0]} pixels, the first of its scene {first[1]} × {first[0]}; the "
                "pictures of a scene have one size",
            )
    content = pack(scene(files, _taken_at(whole, position, rules))).tobytes()
    return f"data:{_VIDEO};base64,{base64.b64encode(content).decode()}", content


def _taken_at(whole: Picture, position: int, rules: PictureRules) -> list[float] | None:
    """When the pictures of a scene were taken, where they say it. Raises `Refused`."""
    seconds = [view.seconds for view in whole.views if view.seconds is not None]
    if not seconds and not rules.timed:
        return None
    if len(seconds) < len(whole.views):
        why = "this model is told when each picture was taken" if rules.timed else "others of its scene say it"
        place = next(number for number, view in enumerate(whole.views) if view.seconds is None)
        raise Refused(400, f"picture {position + place} is without seconds: {why}")
    if seconds != sorted(seconds):
        raise Refused(
            400, f"picture {position}: seconds of its scene are {seconds[:8]}; none may be before the one before it"
        )
    if seconds[-1] > rules.max_seconds:
        raise Refused(
            400, f"picture {position}: its scene lasts {seconds[-1]:g} s, and this server reads {rules.max_seconds:g} s"
        )
    return seconds


def _embedded(picture: Picture, position: int, rules: PictureRules) -> tuple[str, bytes]:
    """A data URI in its one form, and the bytes in it."""
    address, where = picture.address.strip(), f"{'video' if picture.is_video else 'picture'} {position}"
    found = _DATA.match(address)
    if found is None:
        raise Refused(400, f"{where}: expected data:<media type>;base64,<data> or an address, got {shown(address)}")
    data = "".join(address[found.end() :].split())
    kind = found.group(1).lower()
    kind = _VIDEO if picture.is_video else kind if _IMAGE.match(kind) else "image/png"
    url = f"data:{kind};base64,{data}"
    try:
        content = read_bytes(url, where=where)
        if picture.is_video:  # its index is read: damaged, empty and too long ones are found before the engine
            clip = open_video(Video(content), where=where, max_pixels=rules.max_pixels, max_seconds=rules.max_seconds)
            if rules.whole and clip.count > rules.max_frames:
                raise Refused(
                    400,
                    f"{where} has {clip.count} frames, and this model chooses among them by where the scene lies, which a request does not "
                    f"tell; send at most {rules.max_frames} frames, as pictures of a scene or as a shorter video",
                )
            return url, content
        height, width = image_size(content, where=where)
    except DataError as error:
        raise Refused(400, str(error)[:300]) from None
    if height * width > rules.max_pixels:
        raise Refused(
            400,
            f"{where} has {width} × {height} pixels, above this server's limit of {rules.max_pixels / 1e6:g} megapixels",
        )
    return url, content


def _check_mask(mask: Any, size: tuple[int, int], where: str) -> None:
    """Raise `Refused` for anything but run lengths of a picture of this (height, width) that mark some of it. The size comes first: what
    is decoded is as large as it says."""
    if not isinstance(mask, dict) or set(mask) != {"size", "counts"}:
        raise Refused(400, f'{where}: expected run lengths as COCO has them, {{"size": [h, w], "counts": …}}')
    if mask["size"] != list(size):
        raise Refused(400, f"{where}: its size is {shown(mask['size'])} and its picture's {list(size)} (height, width)")
    try:
        marked = decode_rle(mask, where=where)
    except DataError as error:
        raise Refused(400, str(error)[:300]) from None
    if not marked.any():
        raise Refused(400, f"{where}: it marks nothing, so nothing is like it")


def _scheme_of(address: str) -> str:
    scheme = _SCHEME.match(address.strip())
    return "data" if scheme is None else scheme.group(1).lower()


def _check_address(address: str, rules: PictureRules) -> None:
    scheme = _scheme_of(address)
    if scheme not in ("http", "https"):
        raise Refused(400, f"{scheme[:40]}: addresses are not served; send the picture as a base64 data: URI")
    if not rules.domains:
        raise Refused(400, "this server fetches no addresses; send the picture as a base64 data: URI")
    import httpx

    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, ValueError):
        raise Refused(400, f"{shown(address)} is not an address") from None
    if url.userinfo:
        raise Refused(400, "an address with a user's name or a password is not fetched")
    if url.host.lower() not in rules.domains:
        raise Refused(
            400, f"{shown(url.host)}: pictures are fetched from {', '.join(sorted(rules.domains))} only"[:400]
        )


def secret_of(salt: str, owner: str) -> bytes:
    """The key of an owner's cache names: 32 bytes."""
    return hashlib.blake2b(owner.encode(), key=hashlib.sha256(salt.encode()).digest(), digest_size=32).digest()


def cache_salt(secret: bytes, salt: Any, adapter: int = 0) -> str:
    """The salt of a request's prefix cache: the owner's, what the client added to it, and the number of the adapter that answers.
    Raises `Refused`."""
    if salt is not None and (not isinstance(salt, str) or not 0 < len(salt) <= 1024):
        raise Refused(400, "cache_salt must be a text of 1 to 1024 characters")
    number = str(adapter).encode() if adapter else b""
    return hashlib.blake2b((salt or "").encode(), key=secret, digest_size=32, person=b"prefix", salt=number).hexdigest()
