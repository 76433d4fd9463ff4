"""How does the server say that a request was refused? One error, one form: OpenAI's."""

from __future__ import annotations

import json
import re
from typing import Any

_KINDS = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    413: "RequestTooLarge",
    415: "UnsupportedMediaType",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
_SHOWN = 80
"""Most characters of a client's own words in an error (and so in a log)."""
_WORD, _LONGEST = re.compile(r"\S{81,}"), 600
_DEAD = ("EngineCore encountered an issue. See stack trace (above) for the root cause.",
         "the engine has died; what it said is in the server's log")  # fmt: skip
"""What vLLM tells a client, who sees no stack trace, and what we say."""
_ANTHROPIC, _RESPONSES = ("/v1/messages",), "/v1/responses"


class Refused(Exception):
    """A request that must not reach the engine. retry_after: seconds after which it may be sent again."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def shown(value: object) -> str:
    """A client's value for an error message, never longer than 80 characters."""
    text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def shortened(body: bytes) -> bytes:
    """The body of an error with every long word (base64, a made-up name) cut, and every text at a length that still explains."""
    try:
        data = json.loads(body)
    except ValueError:
        return _cut(body.decode("utf-8", "replace")).encode()
    made = _cut_all(data)
    return body if made == data else json.dumps(made).encode()


def _cut_all(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, list):
        return [_cut_all(item) for item in value[:20]]
    if isinstance(value, dict):
        return {_cut(name): _cut_all(item) for name, item in value.items()}
    return value


def plain(text: str) -> str:
    """An engine's words for people who do not see its log; in a stream that has begun they come as they are."""
    return text.replace(*_DEAD)


def _cut(text: str) -> str:
    text = plain(text)
    text = _WORD.sub(lambda word: word.group()[: _SHOWN - 1] + "…", text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def error_body(status: int, message: str, path: str = "") -> bytes:
    """An error in the form of the route's clients: OpenAI's, or Anthropic's, whose own is the same with a type around it."""
    kind = _KINDS.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    body = {"error": {"message": _cut(message), "type": kind, "param": None, "code": status}}
    return json.dumps({"type": "error", **body} if path.startswith(_ANTHROPIC) else body).encode()


def error_event(status: int, message: str, path: str) -> bytes:
    """An error in a stream that has begun, by which the route's clients end it as failed: they read the events by name, but for
    those of chats and completions, which have none."""
    if path.startswith((*_ANTHROPIC, _RESPONSES)):
        return b"event: error\ndata: " + error_body(status, message, _ANTHROPIC[0]) + b"\n\n"
    return b"data: " + error_body(status, message) + b"\n\ndata: [DONE]\n\n"
