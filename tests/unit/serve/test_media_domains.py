"""What happens to a picture that is given by its address?"""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import asynccontextmanager

import pytest

from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.errors import Refused
from mllm.serve.http.keys import Keys
from tests.unit.serve.test_admission import Echo, ask, chat, encoded, names, picture

PNG = base64.b64decode(encoded().partition(",")[2])


@asynccontextmanager
async def host(kind: str):
    """A host on this machine; yields the address of its picture, and the paths that were asked for."""
    asked: list[str] = []

    async def answer(reader, writer):
        asked.append((await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        length = len(PNG)
        if kind == "redirect":
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
        elif kind == "missing":
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif kind == "garbage":
            writer.write(b"what?\r\n\r\n")
        elif kind == "bomb":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00")
        elif kind == "large":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + PNG + bytes(200_000))
        elif kind != "hangs":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
            for place in range(length if kind == "trickles" else 0):  # each byte within any single step's limit
                writer.write(PNG[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.write(b"" if kind == "trickles" else PNG)
        await writer.drain()
        if kind == "hangs":
            await asyncio.sleep(5)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.png", asked
    finally:
        server.close()


def fetch(kind: str, *, domains=("127.0.0.1",), change=lambda url: url):
    """The admitted request (or why it was refused), the paths asked for, and the seconds it took."""

    async def go():
        settings = AdmissionSettings(media_domains=list(domains), media_timeout=0.4, max_body_bytes=100_000)
        admission = Admission(Echo(), settings, Keys([]))
        async with host(kind) as (url, asked):
            started = time.monotonic()
            try:
                return await admission.admit("/v1/chat/completions", chat(picture(change(url)))), asked, 0.0
            except Refused as refusal:
                return refusal, asked, time.monotonic() - started

    return asyncio.run(go())


def test_a_fetched_picture_reaches_the_engine_as_the_embedded_one_does():
    made, asked, _ = fetch("good")
    part = made["messages"][0]["content"][0]
    app = Echo()
    ask(app, chat(picture()))
    embedded = app.raw[0]["messages"][0]["content"][0]
    assert asked == ["/a.png"] and part["image_url"] == embedded["image_url"]
    assert len(part["uuid"]) == len(names(app, 0)[0][0]) == 64


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("redirect", "redirect"),
        ("missing", "status 404"),
        ("garbage", "cannot be fetched"),
        ("bomb", "picture 0"),
        ("large", "above the limit"),
        ("hangs", "within 0.4 s"),
        ("trickles", "within 0.4 s"),
    ],
)
def test_a_host_that_misbehaves_is_a_400_within_the_time(kind, says):
    refusal, asked, seconds = fetch(kind)
    assert isinstance(refusal, Refused) and refusal.status == 400 and says in str(refusal), refusal
    assert asked == ["/a.png"] and seconds < 2


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("127.0.0.1", "localhost"),
        lambda url: url.replace("http://", "http://127.0.0.1@localhost:80@"),
        lambda url: url.replace("http://", "http://user@"),
        lambda url: url.replace("http://", "http:\\\\"),
        lambda url: "file:///etc/passwd",
        lambda url: "ftp" + url[4:],
    ],
)
def test_another_host_is_never_asked(change):
    refusal, asked, _ = fetch("good", change=change)
    assert isinstance(refusal, Refused) and refusal.status == 400 and asked == []
