"""Which requests may reach the server's engine, and in what form? ASGI middleware that vLLM puts in front of its own
app."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic import Field

from mllm.config import StrictModel
from mllm.serve.http.answering import Answer, appending, respond, uncompressed
from mllm.serve.http.content import Content
from mllm.serve.http.drawing import Drawings
from mllm.serve.http.errors import Refused, error_body, shown
from mllm.serve.http.fields import (
    CHAT,
    COMPLETIONS,
    COUNT,
    DETOKENIZE,
    DRAW,
    INFORMATION,
    MESSAGES,
    METRICS,
    OPEN,
    READ,
    ROUTES,
    STATIC,
    STATISTICS,
    TOKENIZE,
    admitted_fields,
)  # fmt: skip
from mllm.serve.http.keys import Keys, check_host
from mllm.serve.http.metrics import count_drawings, count_experts, count_pictures, count_refusal, encoder_metrics
from mllm.serve.http.pictures import PictureRules, cache_salt, check_number, secret_of, write_pictures
from mllm.serve.http.reading import read_json, write_json
from mllm.serve.http.routes import ClientGone, FirstPassFailed, Routes, experts_header
from mllm.serve.http.state import ProcessState
from mllm.serve.http.stats import read_statistics
from mllm.serve.images.requests import NO_HEAD

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ENVIRONMENT = "MLLM_ADMISSION"
"""Environment variable with the settings as JSON; vLLM makes middleware without arguments."""
_HEADERS = frozenset(
    b"host accept accept-encoding accept-language user-agent origin referer cookie connection authorization x-request-id "
    b"traceparent tracestate forwarded x-forwarded-for x-forwarded-proto x-forwarded-host x-real-ip "
    b"endpoint-load-metrics-format".split()
)
"""Headers of a request that the engine may see; others (a data-parallel rank, an adapter) would steer it."""
_LEAVING, _RETRY = "the server is going away; send the request again", 5
"""What a request is told that comes too late or does not finish, and after how many seconds it may come again."""
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:\-]{1,128}$")
_UNSALTED = (MESSAGES, COUNT, TOKENIZE, DETOKENIZE, DRAW)
"""Routes whose vLLM requests have no ``cache_salt``."""
_COUNTED = (TOKENIZE, COUNT)
"""Routes where pictures are counted and not looked at, which needs no routing."""


class AdmissionSettings(StrictModel):
    """What is let through."""

    max_body_bytes: int = Field(default=32 * 2**20, gt=0)
    body_timeout: float = Field(default=60.0, gt=0)
    """Seconds a client may take to send its body."""
    media_domains: list[str] = Field(default_factory=list)
    """Hosts whose pictures vLLM may fetch; empty: only base64 data URIs."""
    max_images: int = Field(default=8, ge=0)
    max_pixels: int = Field(default=16_000_000, gt=0)
    image_token: str = "<image>"
    image_token_id: int | None = None
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
    salt: str = Field(default_factory=lambda: secrets.token_hex(16), min_length=1)
    """What cache names are made with; servers that share a cache share it."""
    loopback: bool = False
    """Whether only names of this machine are answered: a server without a key, which a web page could else reach by a name
    of its own that leads here."""
    greedy: bool = False
    """Whether the server answers greedily where no temperature is asked for."""


class Admission:
    """Lets requests through to vLLM's app, or answers what is wrong with a 4xx in OpenAI's form.

    Closed by default: a route, a field, a kind of content or a header that is not named in `mllm.serve.http.fields`,
    `mllm.serve.http.content` or here does not reach the engine. A body is read once (`read_json`), rewritten to one form
    (`Content`) and written anew, so that vLLM cannot read something else in it. Pictures are checked by their header and
    get a cache name that no client can choose (`write_pictures`). Routes that are not listed are the operator's, with a
    key of their own. With a ``language_model`` router, requests with images are answered in two passes (`Routes`).
    """

    def __init__(
        self,
        app: Any,
        settings: AdmissionSettings | None = None,
        keys: Keys | None = None,
        state: ProcessState | None = None,
    ):
        self.app = app
        self.state = state or ProcessState.of_environment()
        self.settings = settings or AdmissionSettings.model_validate_json(os.environ.get(ENVIRONMENT, "{}"))
        self.keys = keys or Keys.of_environment()
        self.routes = Routes(self.settings.router) if self.settings.router else None
        self.rules = PictureRules(
            self.settings.max_images, self.settings.max_pixels, fetches=bool(self.settings.media_domains)
        )
        self.drawings = Drawings(self.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except Refused as refusal:
            path = route_of(scope)
            count_refusal(refusal.status, path if path in ROUTES or path in READ else "other")
            body = error_body(refusal.status, str(refusal))
            await respond(self.app, scope, receive, send, refusal.status, body, refusal.retry_after)
        except FirstPassFailed as failure:
            await respond(self.app, scope, receive, send, failure.status, failure.body)
        except ClientGone:
            return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = route_of(scope), scope["method"]
        if path in OPEN and self.state.draining:
            raise Refused(503, _LEAVING, retry_after=_RETRY)
        if method == "OPTIONS" or (path in OPEN and method in ("GET", "HEAD")):
            await self.app(scope, receive, send)
            return
        if self.settings.loopback:
            check_host(scope["headers"])
        owner = self.keys.owner(scope["headers"])
        if method in ("GET", "HEAD") and (path in READ or path.startswith(STATIC)):
            await self._read(path, scope, receive, send)
        elif path in ROUTES or path in READ:
            if method != "POST" or path in READ:
                raise Refused(405, f"{path} takes {'GET' if path in READ else 'POST'}, not {method}")
            if self.state.draining:
                raise Refused(503, _LEAVING, retry_after=_RETRY)
            self.state.enter()
            try:
                await self._until_ended(self._work, path, owner, scope, receive, send)
            finally:
                self.state.leave()
        else:
            self.keys.check_operator(owner, f"{method} {shown(path)}")
            await self.app(scope, receive, send)

    async def _read(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == STATISTICS:
            body = json.dumps({"workers": await read_statistics(engine_of(scope))}).encode()
            await respond(self.app, scope, receive, send, 200, body)
        elif path == INFORMATION:
            await respond(self.app, scope, receive, send, 200, json.dumps(self.information()).encode())
        elif path == METRICS:
            await self.app(uncompressed(scope), receive, await self._with_encoders(scope, send))
        else:
            await self.app(scope, receive, send)

    async def _with_encoders(self, scope: Scope, send: Send) -> Send:
        """Append what the encoders did to vLLM's metrics."""
        try:
            more = encoder_metrics(await read_statistics(engine_of(scope), timeout=2.0)).encode()
        except Exception:  # an engine that is busy or dead: vLLM's own metrics say so
            more = b""
        return appending(send, more)

    async def _until_ended(self, work: Any, path: str, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Do the work; when the server goes away first, end the answer with an error."""
        answer = Answer(send)
        working = asyncio.create_task(work(path, owner, scope, receive, answer.send))
        ended = asyncio.create_task(self.state.ended())
        try:
            await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            await answer.end(Refused(503, _LEAVING, retry_after=_RETRY))
        finally:
            working.cancel()
            ended.cancel()

    async def _work(self, path: str, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that makes the engine work."""
        raw = await self.read_body(scope, receive)
        data = await self.admit(path, read_json(scope["headers"], raw), owner)
        if path == DRAW:
            request = self.drawings.request(data)
            drawn = await self.drawings.draw(engine_of(scope), request, receive)
            count_drawings(request.n)
            await respond(self.app, scope, receive, send, 200, drawn)
            return
        inner = handed_on(scope, path)
        weights = (data.get("mm_processor_kwargs") or {}).get("experts")
        if path == CHAT and weights is None and self.routes is not None and self.routes.needed(data):
            weights = await self.routes.decide(self.app, inner, data, receive)
            data["mm_processor_kwargs"] = {"experts": weights}
        if weights is not None:
            count_experts(weights)
        body = write_json(data)
        await self.app(with_length(inner, len(body)), _replay(body, receive), _announcing(send, weights))

    async def read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, within the limits of size and time."""
        limit = self.settings.max_body_bytes
        stated = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
        if stated.isdigit() and int(stated) > limit:
            raise Refused(413, f"the body has {int(stated)} bytes, above the limit of {limit}")
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

    async def admit(self, path: str, data: dict[str, Any], owner: str = "") -> dict[str, Any]:
        """The request as the engine may see it. Raises `Refused`."""
        fields = admitted_fields(path, data)
        content = Content(self.settings.image_token)
        made = content.rewrite(path, fields)
        secret = secret_of(self.settings.salt, owner if len(self.keys.clients) > 1 else "")
        check_number(content.pictures, self.rules)
        if content.pictures:
            await asyncio.to_thread(write_pictures, content.pictures, self.rules, secret)
        count_pictures(len(content.pictures), path)
        self._check_prompt(made.get("prompt"))
        if path in (COMPLETIONS, CHAT):
            self._defaults(made)
        if path not in _UNSALTED:
            made["cache_salt"] = cache_salt(secret, fields.get("cache_salt"))
        self._settings(path, made, len(content.pictures))
        return made

    def _check_prompt(self, prompt: Any) -> None:
        """A prompt of ids holds no picture's place."""
        rows = prompt if isinstance(prompt, list) else []
        ids = self.settings.image_token_id
        if any(ids == row or (isinstance(row, list) and ids in row) for row in rows) and ids is not None:
            raise Refused(400, "prompt: it holds the id of a picture's place; send pictures to " + CHAT)

    def _defaults(self, data: dict[str, Any]) -> None:
        """What OpenAI's clients expect where they say nothing, and a greedy checkpoint would refuse."""
        many = data.get("n")
        if self.settings.greedy and isinstance(many, int) and many > 1 and data.get("temperature") is None:
            data["temperature"] = 1.0

    def _settings(self, path: str, data: dict[str, Any], num_images: int) -> None:
        """Check what steers reading and routing; the routing that is left is the only processor setting."""
        if not _REQUEST_ID.match(str(data.get("request_id", "-"))):
            raise Refused(400, "request_id must be 1 to 128 letters, digits, dots, colons, dashes")
        if {"chat_template", "tokenize"} & set(data.get("chat_template_kwargs") or {}):
            raise Refused(400, "chat_template_kwargs: the checkpoint's own template is used")
        if num_images and data.get("truncate_prompt_tokens") is not None:
            raise Refused(400, "truncate_prompt_tokens: a prompt with pictures is not cut")
        if num_images and path != CHAT and self.routes is not None and self.routes.two_passes and path not in _COUNTED:
            raise Refused(400, f"this model's language model routes pictures, which is done for {CHAT} only")
        settings = data.pop("mm_processor_kwargs", None)
        if not settings:
            return
        if set(settings) != {"experts"}:
            raise Refused(400, 'mm_processor_kwargs: only {"experts": […]} is accepted')
        if self.routes is None:
            raise Refused(400, "experts: this model routes nothing")
        if not num_images or settings["experts"] is None:
            return
        try:
            data["mm_processor_kwargs"] = {"experts": self.routes.check(settings["experts"], num_images)}
        except (ValueError, TypeError) as error:
            raise Refused(400, f"experts: {error}"[:400]) from None

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


def route_of(scope: Scope) -> str:
    """The path below the server's root, as Starlette's router reads it."""
    path, root = scope["path"], scope.get("root_path", "")
    rest = path[len(root) :] if path.startswith(root) else path
    return rest if rest.startswith("/") else path


def handed_on(scope: Scope, path: str) -> Scope:
    """The request line and headers that the engine sees: the route that was admitted, no query, known headers."""
    kept = [(name, value) for name, value in scope["headers"] if name.lower() in _HEADERS]
    kept = [pair for pair in kept if pair[0].lower() != b"x-request-id" or _REQUEST_ID.match(pair[1].decode("latin-1"))]
    whole = scope.get("root_path", "") + path
    return {
        **scope,
        "path": whole,
        "raw_path": whole.encode(),
        "query_string": b"",
        "headers": [*kept, (b"content-type", b"application/json")],
    }


def with_length(scope: Scope, length: int) -> Scope:
    """The request with the length of its new body."""
    return {**scope, "headers": [*scope["headers"], (b"content-length", str(length).encode())]}


def engine_of(scope: Scope) -> Any:
    """vLLM's client of the engine behind the server."""
    client = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    if client is None:
        raise Refused(404, "this server has no engine")
    return client


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was admitted, once; after it what the client does (disconnects stop generation)."""
    sent = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _announcing(send: Send, weights: list[dict[str, float]] | None) -> Send:
    """Tell in a response header which experts look at the request's pictures."""
    if weights is None:
        return send
    experts = experts_header(weights).encode()

    async def announce(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"x-mllm-experts", experts)]}
        await send(message)

    return announce
