"""How is an answer of the server's own sent, one that passes changed, and one that has begun ended?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mllm.serve.http.errors import Refused, error_body, error_event, shortened

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OWN, _KEPT = "/mllm/answer", "mllm.answer"


def is_stream(start: MutableMapping[str, Any]) -> bool:
    """Whether the answer that begins so comes as events."""
    kinds = [value for name, value in start.get("headers", []) if name.lower() == b"content-type"]
    return any(kind.startswith(b"text/event-stream") for kind in kinds)


def with_length(message: MutableMapping[str, Any], length: int) -> MutableMapping[str, Any]:
    """A request, or the start of an answer, with the length of its new body."""
    headers = [pair for pair in message.get("headers", []) if pair[0].lower() != b"content-length"]
    return {**message, "headers": [*headers, (b"content-length", str(length).encode())]}


class Answer:
    """Watches how far an answer has come, so that it can be ended in its own form."""

    def __init__(self, send: Send, path: str):
        self._send, self._path, self._stream = send, path, False
        self._begun = self._over = False
        self.status = 0
        """Of the answer; 0 before it has begun."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Hand on a message of the answer; nothing after its end."""
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            self._stream = is_stream(message)
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
            body = error_event(status, text, self._path)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


class Changed:
    """Changes a successful answer as it passes: whole once all of it is there, a stream event by event. send: where it goes. Other answers
    pass as they are."""

    def __init__(self, send: Send):
        self._send = send
        self._start: MutableMapping[str, Any] | None = None
        self._stream, self._body = False, bytearray()

    async def whole(self, body: bytes) -> bytes:
        """What goes on in place of a whole answer."""
        raise NotImplementedError

    async def event(self, event: bytes) -> bytes:
        """What goes on in place of one event of a stream; neither has the empty line at its end."""
        raise NotImplementedError

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Hand on a message of the answer."""
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._start, self._stream = message, is_stream(message)
            if self._stream:
                await self._send(message)
            return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._body += message.get("body", b"")
        last = not message.get("more_body")
        if self._stream:
            *events, rest = bytes(self._body).split(b"\n\n")
            self._body = bytearray(rest)
            passed = b"".join([await self.event(event) + b"\n\n" for event in events]) + (rest if last else b"")
            if passed or last:
                await self._send({**message, "body": passed})
        elif last:
            body = bytes(self._body)
            made = await self.whole(body)
            await self._send(self._start if made == body else with_length(self._start, len(made)))
            await self._send({**message, "body": made})


async def respond(
    app: Any,
    scope: Scope,
    receive: Any,
    send: Send,
    status: int,
    body: bytes,
    retry_after: int | None = None,
    kind: bytes = b"application/json",
) -> None:
    """An answer of the server's own, sent through vLLM's app where there is one, so that its middleware adds what it adds
    to every answer (CORS headers, the request id) and counts it."""
    routes = getattr(getattr(scope.get("app"), "router", None), "routes", None)
    if routes is None:
        await send_whole(send, status, body, retry_after, kind)
        return
    if not routes or getattr(routes[0], "path", None) != _OWN:
        from starlette.routing import Route

        routes.insert(0, Route(_OWN, _OwnAnswer(), name="mllm answer", include_in_schema=False))
    path = scope.get("root_path", "") + _OWN
    own = {"path": path, "raw_path": path.encode(), "query_string": b"", "method": "GET"}
    await app({**scope, **own, _KEPT: (status, body, retry_after, kind)}, receive, send)


class _OwnAnswer:
    """The route behind vLLM's middleware at which answers of the server's own are sent."""

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        kept: tuple[int, bytes, int | None, bytes] = scope.get(_KEPT) or (
            404,
            error_body(404, "nothing is here"),
            None,
            b"application/json",
        )
        await send_whole(send, *kept)


async def send_whole(send: Send, status: int, body: bytes, retry_after: int | None, kind: bytes) -> None:
    """A whole answer."""
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def adding(send: Send, headers: Callable[[], Awaitable[list[tuple[bytes, bytes]]]]) -> Send:
    """Put headers on a successful answer that are known when its first piece is: a stream's start waits for that."""
    start: MutableMapping[str, Any] | None = None

    async def more(message: MutableMapping[str, Any]) -> None:
        nonlocal start
        if message["type"] == "http.response.start" and message["status"] == 200:
            start = message
            return
        if start is not None:
            begun, start = start, None
            await send({**begun, "headers": [*begun.get("headers", []), *await headers()]})
        await send(message)

    return more


def shortening(send: Send) -> Send:
    """The engine's refusals, with what it repeats of a request cut to 80 characters as in our own."""
    start: MutableMapping[str, Any] | None = None
    body = bytearray()

    async def shorter(message: MutableMapping[str, Any]) -> None:
        nonlocal start
        if message["type"] == "http.response.start" and message["status"] >= 400:
            start = message
            return
        if start is None or message["type"] != "http.response.body":
            await send(message)
            return
        body.extend(message.get("body", b""))
        if message.get("more_body"):
            return
        made = shortened(bytes(body))
        await send(with_length(start, len(made)))
        await send({**message, "body": made})

    return shorter


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
