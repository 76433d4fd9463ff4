"""Which requests may reach the server's engine, and in what form? ASGI middleware that vLLM puts in front of its own
app."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic import Field

from mllm.config import StrictModel
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.processing.images import image_size
from mllm.serve.http.routes import ClientGone, FirstPassFailed, Routes, disconnected, pictures, told
from mllm.serve.http.stats import read_statistics
from mllm.serve.images.requests import NO_HEAD

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ENVIRONMENT = "MLLM_GUARD"
"""Environment variable with the guard's settings as JSON; vLLM makes middleware without arguments."""
OPEN_PATHS = ("/health", "/ping")
STATISTICS, INFORMATION = "/mllm/stats", "/mllm/info"
_SCHEME = re.compile(r"^\s*([a-zA-Z][a-zA-Z0-9+.\-]*):")
_BASE64 = re.compile(r"^\s*data:[^,]{0,200};base64,", re.IGNORECASE)
_ADDRESS_KEYS = ("url", "image_url", "video_url", "audio_url", "image", "file_url", "file_data")
_CACHE_KEYS = ("uuid",)
_OBJECTS = ("structured_outputs", "response_format", "stream_options")
"""Fields that must hold an object; vLLM stumbles over anything else with a 500."""
CHAT = "/chat/completions"
DRAW = "/images/generations"
_MAX_DEPTH = 64


class GuardSettings(StrictModel):
    """What is let through."""

    max_body_bytes: int = Field(default=32 * 2**20, gt=0)
    body_timeout: float = Field(default=60.0, gt=0)
    """Seconds a client may take to send its body."""
    media_domains: list[str] = Field(default_factory=list)
    """Hosts whose pictures vLLM may fetch; empty: only base64 data URIs."""
    max_images: int = Field(default=8, ge=0)
    max_pixels: int = Field(default=16_000_000, gt=0)
    image_token: str = "<image>"
    router: dict[str, Any] | None = None
    """The checkpoint's router config; None: nothing is routed."""
    checkpoint: str | None = None
    """Whose visual tokenizer decodes drawings; None: nothing is drawn."""
    cannot_draw: str = NO_HEAD
    """What a drawing request is told where ``checkpoint`` is None."""
    max_drawings: int = Field(default=4, ge=1)
    """Most pictures one request may ask for."""
    name: str | None = None
    """The served model's name."""


class Refused(Exception):
    """A request that must not reach the engine."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Guard:
    """Checks key, size, addresses and settings of every request; answers what is wrong with a 4xx in OpenAI's form.

    Beyond vLLM's own checks: the body's size and the time it takes; every picture's format and size by its header;
    ``file://`` and foreign addresses (a plain 400); cache names chosen by clients (a ``uuid`` could put one picture
    under another's hash); image-processor settings other than ``experts``; placeholders typed anywhere in a
    conversation, tool arguments included. With a ``language_model`` router, requests with images are answered in two
    passes (`Routes`).
    """

    def __init__(self, app: Any, settings: GuardSettings | None = None, api_key: str | None = None):
        self.app = app
        self.settings = settings or GuardSettings.model_validate_json(os.environ.get(ENVIRONMENT, "{}"))
        self.api_key = api_key if api_key is not None else os.environ.get("VLLM_API_KEY")
        self.routes = Routes(self.settings.router) if self.settings.router else None
        self._studio: Any = None
        self._studio_lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.check_key(scope)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if scope["method"] == "GET" and path in (STATISTICS, INFORMATION):
                report = await self._statistics(scope) if path == STATISTICS else self.information()
                await _answer(send, 200, json.dumps(report).encode())
                return
            if scope["method"] not in ("POST", "PUT", "PATCH"):
                await self.app(scope, receive, send)
                return
            body = await self.read_body(scope, receive)
            body, experts = await self.admit(scope, body, receive)
            if scope["method"] == "POST" and path.endswith(DRAW):
                await _answer(send, 200, await self.draw(scope, body, receive))
                return
        except Refused as refusal:
            await _answer(send, refusal.status, error_body(refusal.status, str(refusal)))
            return
        except FirstPassFailed as failure:
            await _answer(send, failure.status, failure.body)
            return
        except ClientGone:
            return
        await self.app(_with_length(scope, len(body)), _replay(body, receive), _announcing(send, experts))

    def check_key(self, scope: Scope) -> None:
        """Every path but the health checks needs the key, when one is set."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self.api_key or path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self.api_key.encode()):
            raise Refused(401, "the API key is missing or wrong (header Authorization: Bearer <key>)")

    async def read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, within the limits of size and time."""
        limit = self.settings.max_body_bytes
        stated = _header(scope, b"content-length")
        if stated.isdigit() and int(stated) > limit:
            raise Refused(413, f"the body has {stated} bytes, above the limit of {limit}")
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise Refused(413, f"the body is above the limit of {limit} bytes")
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.settings.body_timeout:g} s") from None

    async def admit(self, scope: Scope, body: bytes, receive: Receive) -> tuple[bytes, str | None]:
        """The body as the engine may see it, and the experts it will use where that is known."""
        if not body.strip() or "json" not in (_header(scope, b"content-type") or "json"):
            return body, None
        try:
            data = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not valid JSON") from None
        if not isinstance(data, dict):
            raise Refused(400, "the body must be a JSON object")
        for name in _OBJECTS:
            if data.get(name) is not None and not isinstance(data[name], dict):
                raise Refused(400, f"{name} must be an object")
        embedded: list[str] = []
        data = self._walk(data, 0, embedded)
        if embedded:
            await asyncio.to_thread(self.check_pictures, embedded)
        count = len(pictures(data))
        if count > self.settings.max_images:
            raise Refused(400, f"{count} pictures in one request; at most {self.settings.max_images} are served")
        weights = self._settings(data, count)
        if self.routes is not None and weights is None and scope["path"].endswith(CHAT) and self.routes.needed(data):
            weights = await self.routes.decide(self.app, scope, data, receive)
        if weights is not None:
            data["mm_processor_kwargs"] = {"experts": weights}
        body = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")
        return body, told(weights) if weights else None

    def check_pictures(self, addresses: list[str]) -> None:
        """Read the header of every embedded picture: its format and size, before anything is decoded."""
        for position, address in enumerate(addresses):
            try:
                uri = "data:" + address.strip()[len("data:") :]  # never anything that could be taken for a path
                height, width = image_size(uri, where=f"picture {position}")
            except DataError as error:
                raise Refused(400, str(error)) from None
            if height * width > self.settings.max_pixels:
                raise Refused(
                    400,
                    f"picture {position} has {width} × {height} pixels, above this server's limit of "
                    f"{self.settings.max_pixels / 1e6:g} megapixels",
                )

    def _walk(self, value: Any, depth: int, embedded: list[str], key: str = "") -> Any:
        if depth > _MAX_DEPTH:
            raise Refused(400, f"the body is nested deeper than {_MAX_DEPTH} levels")
        if isinstance(value, dict):
            if any(value.get(name) is not None for name in _CACHE_KEYS) and "type" in value:
                raise Refused(400, "uuid is not accepted: pictures are cached by their content only")
            return {name: self._walk(item, depth + 1, embedded, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self._walk(item, depth + 1, embedded, key) for item in value]
        if isinstance(value, str):
            if key in _ADDRESS_KEYS and (scheme := _SCHEME.match(value)):
                self._check_address(scheme.group(1).lower(), value)
                if scheme.group(1).lower() == "data":
                    embedded.append(value)
                return value
            token = self.settings.image_token
            return value.replace(token, token[:1] + " " + token[1:])
        return value

    def _check_address(self, scheme: str, address: str) -> None:
        if scheme == "data":
            if not _BASE64.match(address):
                raise Refused(400, "a data: URI must read data:<media type>;base64,<data>")
            return
        if scheme not in ("http", "https"):
            raise Refused(400, f"{scheme}: addresses are not served; send the picture as a base64 data: URI")
        if not self.settings.media_domains:
            raise Refused(400, "this server fetches no addresses; send the picture as a base64 data: URI")

    def _settings(self, data: dict[str, Any], num_images: int) -> list[dict[str, float]] | None:
        """Take the per-request settings out; returns the routing they fix, the only one that is accepted."""
        if data.get("media_io_kwargs"):
            raise Refused(400, "media_io_kwargs is not accepted")
        if isinstance(data.get("vllm_xargs"), dict) and any(str(key).startswith("mllm_") for key in data["vllm_xargs"]):
            raise Refused(400, f"vllm_xargs: names that begin with mllm_ are the server's own; draw at /v1{DRAW}")
        settings = data.pop("mm_processor_kwargs", None)
        if not settings:
            return None
        if not isinstance(settings, dict) or set(settings) != {"experts"}:
            raise Refused(400, 'mm_processor_kwargs: only {"experts": […]} is accepted')
        if self.routes is None:
            raise Refused(400, "experts: this model routes nothing")
        if not num_images or settings["experts"] is None:
            return None
        try:
            return self.routes.check(settings["experts"], num_images)
        except (ValueError, TypeError) as error:
            raise Refused(400, f"experts: {error}") from None

    async def draw(self, scope: Scope, body: bytes, receive: Receive) -> bytes:
        """The answer to an image request; stops drawing when the client goes away."""
        if self.settings.checkpoint is None:
            raise Refused(400, self.settings.cannot_draw)
        from mllm.serve.images.api import Busy, ImagesRequest, ImageStudio

        try:
            request = ImagesRequest.model_validate(json.loads(body or b"{}"))
        except ValueError as error:
            raise Refused(400, _said(error)) from None
        if request.n > self.settings.max_drawings:
            raise Refused(
                400, f"n: {request.n} pictures in one request; at most {self.settings.max_drawings} are drawn"
            )
        if request.model not in (None, self.settings.name):
            raise Refused(404, f"model {request.model!r} is not served here; this is {self.settings.name!r}")
        client = _engine(scope)
        async with self._studio_lock:
            if self._studio is None:
                self._studio = await asyncio.to_thread(ImageStudio, self.settings.checkpoint)
        drawing = asyncio.create_task(self._studio.draw(client, request))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise ClientGone
            return json.dumps(drawing.result()).encode()
        except Busy as error:
            raise Refused(503, str(error)) from None
        except (ConfigError, UnavailableError, ValueError) as error:  # ValueError: vLLM's, a prompt too long
            raise Refused(400, str(error)) from None
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:
            raise Refused(500, f"the engine could not draw: {type(error).__name__}") from error
        finally:
            drawing.cancel()
            gone.cancel()

    def information(self) -> dict[str, Any]:
        """What a client can ask for: pictures per request, experts, who routes, and whether it draws."""
        router = self.settings.router or {}
        return {
            "max_images": self.settings.max_images,
            "experts": list(router.get("experts", [])),
            "router": router.get("type"),
            "media_domains": self.settings.media_domains,
            "draws": self.settings.checkpoint is not None,
        }

    async def _statistics(self, scope: Scope) -> dict[str, Any]:
        return {"workers": await read_statistics(_engine(scope))}


def _engine(scope: Scope) -> Any:
    """vLLM's client of the engine behind the server."""
    client = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    if client is None:
        raise Refused(404, "this server has no engine")
    return client


def _said(error: ValueError) -> str:
    """A validation error on one line: the fields and what is wrong with them."""
    if not hasattr(error, "errors"):
        return str(error)
    found = error.errors()  # type: ignore[attr-defined]
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in found)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def error_body(status: int, message: str) -> bytes:
    """An error in OpenAI's form."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 408: "RequestTimeout", 413: "RequestTooLarge"}
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")


def _with_length(scope: Scope, length: int) -> Scope:
    kept = [(k, v) for k, v in scope["headers"] if k.lower() not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once; after it what the client does (disconnects stop generation)."""
    sent = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _announcing(send: Send, experts: str | None) -> Send:
    """Tell in a response header which experts look at the request's pictures."""
    if experts is None:
        return send

    async def announce(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"x-mllm-experts", experts.encode())]}
        await send(message)

    return announce
