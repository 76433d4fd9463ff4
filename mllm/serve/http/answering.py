"""How is an answer of the server's own sent, and one that has begun ended?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mllm.serve.http.errors import error_body

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Answer:
    """Watches how far an answer has come, so that it can be ended in its own form."""

    def __init__(self, send: Send):
        self._send, self._stream = send, False
        self._begun = self._over = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Hand on a message of the answer; nothing after its end."""
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._begun = True
            kinds = [value for name, value in message.get("headers", []) if name.lower() == b"content-type"]
            self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self._over = True
        await self._send(message)

    async def end(self, status: int, text: str) -> None:
        """End the answer now: with an error of its own, with an error event in a stream, or cut where it is."""
        if self._over:
            return
        self._over, body = True, b""
        if not self._begun:
            await send_json(self._send, status, error_body(status, text), 5)
            return
        if self._stream:
            body = b"data: " + error_body(status, text) + b"\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


async def send_json(send: Send, status: int, body: bytes, retry_after: int | None = None) -> None:
    """A whole JSON answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
