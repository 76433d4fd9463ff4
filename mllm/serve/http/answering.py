"""How is an answer of the server's own sent, and one that has begun ended?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mllm.serve.http.errors import Refused, error_body

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OWN, _KEPT = "/mllm/answer", "mllm.answer"


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

    async def end(self, refusal: Refused) -> None:
        """End the answer now: with an error event in a stream, or cut where it is. Raises ``refusal`` where nothing was
        sent yet."""
        if self._over:
            return
        self._over, body = True, b""
        if not self._begun:
            raise refusal
        status, text = refusal.status, str(refusal)
        if self._stream:
            body = b"data: " + error_body(status, text) + b"\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


async def respond(
    app: Any, scope: Scope, receive: Any, send: Send, status: int, body: bytes, retry_after: int | None = None
) -> None:
    """An answer of the server's own, sent through vLLM's app where there is one, so that its middleware adds what it adds
    to every answer (CORS headers, the request id) and counts it."""
    routes = getattr(getattr(scope.get("app"), "router", None), "routes", None)
    if routes is None:
        await send_json(send, status, body, retry_after)
        return
    if not routes or getattr(routes[0], "path", None) != _OWN:
        from starlette.routing import Route

        routes.insert(0, Route(_OWN, _OwnAnswer(), name="mllm answer", include_in_schema=False))
    path = scope.get("root_path", "") + _OWN
    own = {"path": path, "raw_path": path.encode(), "query_string": b"", "method": "GET"}
    await app({**scope, **own, _KEPT: (status, body, retry_after)}, receive, send)


class _OwnAnswer:
    """The route behind vLLM's middleware at which answers of the server's own are sent."""

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        status, body, retry_after = scope.get(_KEPT) or (404, error_body(404, "nothing is here"), None)
        await send_json(send, status, body, retry_after)


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


def uncompressed(scope: Scope) -> Scope:
    """The request, answered as it is: so that something can be put at its end."""
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() != b"accept-encoding"]}


def appending(send: Send, more: bytes) -> Send:
    """Put text at the end of a successful answer."""
    wanted = False

    async def longer(message: MutableMapping[str, Any]) -> None:
        nonlocal wanted
        if message["type"] == "http.response.start":
            wanted = message["status"] == 200
            headers = [
                pair for pair in message.get("headers", []) if not (wanted and pair[0].lower() == b"content-length")
            ]
            message = {**message, "headers": headers}
        elif wanted and not message.get("more_body"):
            message = {**message, "body": message.get("body", b"") + more}
        await send(message)

    return longer
