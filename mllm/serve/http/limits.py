"""How much may a client ask for in a minute? Requests, pictures and tokens, counted for all processes of a server together."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from mllm.serve.http.answering import is_stream
from mllm.serve.http.errors import Refused
from mllm.serve.http.keys import Client
from mllm.serve.http.state import FOLDER

_ROW = struct.Struct("dddd")  # the time, and what is left of requests, pictures, tokens
_KINDS = ("requests", "pictures", "tokens")


class Limits:
    """A bucket for every client and kind: full at first, refilled over a minute. clients: name → `Client`; folder: what the
    server's processes share; without one this process counts alone."""

    def __init__(
        self, clients: Mapping[str, Client], folder: str | None = None, clock: Callable[[], float] = time.time
    ):
        self.clients, self.folder, self.clock = clients, Path(folder) if folder else None, clock
        self._alone: dict[str, bytes] = {}

    @classmethod
    def of_environment(cls, clients: Mapping[str, Client]) -> Limits:
        """Those of the server that this process belongs to."""
        return cls(clients, os.environ.get(FOLDER))

    def meters(self, owner: str) -> bool:
        """Whether this client's tokens are counted: those of every client with a name."""
        return owner in self.clients

    def take(self, owner: str, *, requests: int = 0, pictures: int = 0) -> None:
        """Count a request, or its pictures. Raises `Refused` with 429 and the seconds until it would be taken."""
        client = self.clients.get(owner)
        if client is None:
            return
        if client.pictures is not None and pictures > client.pictures:
            raise Refused(400, f"{pictures} pictures in one request; this key may send {client.pictures} a minute")
        with self._levels(owner, client) as levels:
            wanted = {"requests": requests, "pictures": pictures, "tokens": 0}
            for kind in _KINDS:
                limit = getattr(client, kind)
                # Tokens are known afterwards: a client that has some left is answered, and may owe.
                missing = wanted[kind] - levels[kind] if kind != "tokens" else (1 - levels[kind]) * bool(requests)
                if limit is not None and missing > 0 and (wanted[kind] or kind == "tokens"):
                    pause = max(1, math.ceil(missing * 60 / limit))
                    raise Refused(
                        429, f"this key may use {limit} {kind} a minute; again in {pause} s", retry_after=pause
                    )
            for kind in ("requests", "pictures"):
                levels[kind] -= wanted[kind]

    def spend(self, owner: str, tokens: int) -> None:
        """Count the tokens of an answer, once they are known."""
        client = self.clients.get(owner)
        if client is not None and client.tokens is not None and tokens:
            with self._levels(owner, client) as levels:
                levels["tokens"] -= tokens

    @contextlib.contextmanager
    def _levels(self, owner: str, client: Client) -> Iterator[dict[str, float]]:
        """What is left of every kind now; what the block leaves is kept."""
        with self._row(owner) as row:
            now = self.clock()
            kept = row["bytes"]
            since, *left = _ROW.unpack(kept) if len(kept) == _ROW.size else (now, *(math.inf for _ in _KINDS))
            levels: dict[str, float] = {}
            for kind, value in zip(_KINDS, left):
                limit = getattr(client, kind)
                passed = max(0.0, now - since)
                levels[kind] = math.inf if limit is None else min(float(limit), value + passed * limit / 60)
            try:
                yield levels
            finally:
                row["bytes"] = _ROW.pack(now, *(levels[kind] for kind in _KINDS))

    @contextlib.contextmanager
    def _row(self, owner: str) -> Iterator[dict[str, bytes]]:
        if self.folder is None:
            row = {"bytes": self._alone.get(owner, b"")}
            yield row
            self._alone[owner] = row["bytes"]
            return
        number = sorted(self.clients).index(owner)
        with os.fdopen(os.open(self.folder / f"client-{number}", os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            row = {"bytes": file.read()}
            try:
                yield row
            finally:
                file.seek(0)
                file.write(row["bytes"])


class Meter:
    """Reads how many tokens an answer used as it passes. hide: the client did not ask for the usage of its stream, so the
    event with it goes no further."""

    def __init__(self, send: Any, *, hide: bool):
        self._send, self._hide = send, hide
        self._stream, self._rest, self._body = False, b"", bytearray()
        self.reported, self.events = 0, 0

    @property
    def tokens(self) -> int:
        """Prompt and answer; of an answer that was broken off, its events."""
        return self.reported or self.events

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Hand on a message of the answer."""
        if message["type"] == "http.response.start":
            self._stream = is_stream(message)
        elif message["type"] == "http.response.body" and self._stream:
            message = {**message, "body": self._events(message.get("body", b""), not message.get("more_body"))}
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                self.reported = max(self.reported, used(bytes(self._body)))
        await self._send(message)

    def _events(self, body: bytes, last: bool) -> bytes:
        """Whole events, without the one that was asked for here."""
        *whole, self._rest = (self._rest + body).split(b"\n\n")
        passed = bytearray()
        for event in whole:
            data = event.rpartition(b"data: ")[2]
            tokens = used(data) if b'"usage"' in data else 0
            self.reported = max(self.reported, tokens)
            self.events += data[:1] == b"{"
            if not (self._hide and tokens and b'"choices":[]' in data.replace(b" ", b"")):
                passed += event + b"\n\n"
        if last:
            passed += self._rest
        return bytes(passed)


def used(body: bytes) -> int:
    """Tokens of prompt and answer by the usage in a body or an event of OpenAI's or Anthropic's form; 0 without one."""
    try:
        data = json.loads(body)
    except ValueError:
        return 0
    if not isinstance(data, dict):
        return 0
    usage = data.get("usage") or (data.get("response") or {}).get("usage") or (data.get("message") or {}).get("usage")
    if not isinstance(usage, dict):
        return 0
    total = usage.get("total_tokens")
    return int(total if total is not None else usage.get("input_tokens", 0) + usage.get("output_tokens", 0))
