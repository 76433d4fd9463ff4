"""How does the server say that a request was refused? One error, one form: OpenAI's."""

from __future__ import annotations

import json

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


class Refused(Exception):
    """A request that must not reach the engine. retry_after: seconds after which it may be sent again."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def shown(value: object) -> str:
    """A client's value for an error message, never longer than 80 characters."""
    text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def error_body(status: int, message: str) -> bytes:
    """An error in OpenAI's form."""
    kind = _KINDS.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
