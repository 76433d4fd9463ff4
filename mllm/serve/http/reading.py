"""What does a request's body say? It is read once, strictly; the engine gets what was read, written anew."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from mllm.serve.http.errors import Refused, shown

MAX_DEPTH = 64
_LONGEST_NUMBER = 64


def read_json(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises `Refused` for whatever two readers could read in two ways.

    That is: another media type than ``application/json`` or two of them, a compressed body, another encoding than UTF-8,
    a key written twice, NaN and infinite numbers, nesting deeper than 64 levels, and half of a surrogate pair in a key
    (in a text it becomes "?").
    """
    _check_media_type([value for name, value in headers if name.lower() == b"content-type"])
    for name, value in headers:
        if name.lower() == b"content-encoding" and value.strip().lower() != b"identity":
            raise Refused(415, "a compressed body is not accepted: send the JSON as it is")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    try:
        data = _DECODER.decode(text)
    except RecursionError:
        raise Refused(400, f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise Refused(400, f"the body is not valid JSON ({_where(error)})") from None
    if not isinstance(data, dict):
        raise Refused(400, "the body must be a JSON object")
    return _whole(data, 0)


def read_object(text: str, what: str) -> dict[str, Any]:
    """JSON inside a string (a tool call's arguments), as strictly as the body itself."""
    try:
        data = _DECODER.decode(text or "{}")
    except (ValueError, RecursionError):
        raise Refused(400, f"{what} must be the text of a JSON object") from None
    if not isinstance(data, dict):
        raise Refused(400, f"{what} must be the text of a JSON object")
    return _whole(data, 0)


def write_json(data: Any) -> bytes:
    """The bytes for the engine: ASCII, so that no reader can take them for another encoding."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii")


def _check_media_type(values: list[bytes]) -> None:
    if len(values) > 1:
        raise Refused(415, "two Content-Type headers")
    kind, *parameters = (values[0].decode("latin-1") if values else "").split(";")
    if kind.strip().lower() != "application/json":
        raise Refused(415, f"send the header Content-Type: application/json (it is {shown(kind.strip())})")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise Refused(415, f"JSON is UTF-8; charset {shown(value.strip())} is not accepted")


def _whole(value: Any, depth: int) -> Any:
    """The value with every text encodable."""
    if depth > MAX_DEPTH:
        raise Refused(400, f"the body is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_whole(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item, depth + 1) for name, item in value.items()}
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Unclear(f"the key {shown(next(name for name in names if names.count(name) > 1))} appears twice")
    for name in made:
        if not name.isascii() and name.encode("utf-8", "replace").decode("utf-8") != name:
            raise _Unclear("a key holds half of a surrogate pair")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Unclear(f"the number {shown(text)} is out of range")
    return number


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise _Unclear(f"a number of {len(text)} digits")
    return int(text)


def _no_constant(name: str) -> Any:
    raise _Unclear(f"{name} is not JSON")


class _Unclear(ValueError):
    """Something that is wrong for us, though a JSON reader may take it."""


def _where(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.lower()} at byte {error.pos}"
    return str(error)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_once, parse_float=_finite, parse_int=_integer, parse_constant=_no_constant
)
