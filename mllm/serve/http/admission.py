"""Which requests may reach the server's engine, and in what form? ASGI middleware that vLLM puts in front of its own
app."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from mllm.serve.adapters import ADAPTER
from mllm.serve.http.adapters import ServedAdapters
from mllm.serve.http.answer_text import FirstWord
from mllm.serve.http.answering import Answer, adding, appending, respond, shortening, uncompressed, with_length
from mllm.serve.http.content import Content, Picture
from mllm.serve.http.drawing import Drawings
from mllm.serve.http.errors import Refused, error_body, shortened, shown
from mllm.serve.http.fields import (
    CHAT,
    COMPLETIONS,
    COUNT,
    DETOKENIZE,
    DOCS,
    DRAW,
    INFORMATION,
    LOAD_ADAPTER,
    MESSAGES,
    METRICS,
    OPEN,
    OPENAPI,
    READ,
    RESPONSES,
    ROUTES,
    STATIC,
    STATISTICS,
    TOKENIZE,
    UNLOAD_ADAPTER,
    admitted_fields,
)  # fmt: skip
from mllm.serve.http.heads_beside import HeadFields, asked_of_heads
from mllm.serve.http.keys import Keys, check_host
from mllm.serve.http.limits import Limits, Meter, used
from mllm.serve.http.metrics import (
    count_client,
    count_drawings,
    count_experts,
    count_pictures,
    count_refusal,
    encoder_metrics,
    state_metrics,
)
from mllm.serve.http.openapi import PAGE, describe
from mllm.serve.http.pictures import (
    PictureRules,
    cache_salt,
    check_number,
    fetch_pictures,
    secret_of,
    singly,
    write_pictures,
)
from mllm.serve.http.reading import read_json, write_json
from mllm.serve.http.routes import ClientGone, FirstPassFailed, Routes, experts_header, pictures
from mllm.serve.http.settings import ENVIRONMENT, AdmissionSettings
from mllm.serve.http.state import ProcessState
from mllm.serve.http.stats import picture_key, read_choices, read_heads, read_statistics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

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
        self.limits = Limits.of_environment(self.keys.named)
        self.rules = PictureRules(
            self.settings.max_images,
            self.settings.max_pixels,
            self.settings.max_videos,
            self.settings.max_seconds,
            frozenset(domain.lower() for domain in self.settings.media_domains),
            self.settings.max_body_bytes,
            self.settings.media_timeout,
            self.settings.max_frames,
            self.settings.timed,
            self.settings.whole,
        )
        self.drawings = Drawings(self.settings)
        self.adapters = ServedAdapters(
            self.settings.adapters, self.settings.visual_adapters, heads=self.settings.heads is not None
        )

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
            body = error_body(refusal.status, str(refusal), path)
            await respond(self.app, scope, receive, send, refusal.status, body, refusal.retry_after)
        except FirstPassFailed as failure:
            await respond(self.app, scope, receive, send, failure.status, shortened(failure.body))
        except ClientGone:
            return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = route_of(scope), scope["method"]
        if method == "HEAD":  # the web server leaves out the body
            scope, method = {**scope, "method": "GET"}, "GET"
        if path in OPEN and self.state.draining:
            raise Refused(503, _LEAVING, retry_after=_RETRY)
        if method == "OPTIONS" or (path in OPEN and method == "GET"):
            await self.app(scope, receive, send)
            return
        if self.settings.loopback:
            check_host(scope["headers"])
        owner = self.keys.owner(scope["headers"])
        if method == "GET" and (path in READ or path.startswith(STATIC)):
            await self._read(path, scope, receive, send)
        elif path in ROUTES or path in READ:
            if method != "POST" or path in READ:
                raise Refused(405, f"{path} takes {'GET' if path in READ else 'POST'}, not {method}")
            if self.state.draining:
                raise Refused(503, _LEAVING, retry_after=_RETRY)
            if owner in self.keys.named:
                count_client(owner, requests=1)
            self.limits.take(owner, requests=1)
            self.state.enter()
            try:
                await self._until_ended(self._work, path, owner, scope, receive, send)
            finally:
                self.state.leave()
        else:
            self.keys.check_operator(owner, f"{method} {shown(path)}")
            if path in (LOAD_ADAPTER, UNLOAD_ADAPTER) and method == "POST":
                await self._change_adapters(path, scope, receive, send)
            else:
                await self.app(scope, receive, send)

    async def _change_adapters(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await self.read_body(scope, receive)
        answer = Answer(send, path)

        async def hand_on() -> int:
            await self.app(scope, _replay(raw, receive), answer.send)
            return answer.status

        change = self.adapters.load if path == LOAD_ADAPTER else self.adapters.unload
        await change(read_json(scope["headers"], raw), partial(engine_of, scope), hand_on)

    async def _read(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == STATISTICS:
            body = json.dumps({"workers": await read_statistics(engine_of(scope))}).encode()
            await respond(self.app, scope, receive, send, 200, body)
        elif path == INFORMATION:
            await respond(self.app, scope, receive, send, 200, json.dumps(self.information()).encode())
        elif path == OPENAPI and hasattr(scope.get("app"), "openapi"):
            body = json.dumps(self._description(scope["app"])).encode()
            await respond(self.app, scope, receive, send, 200, body)
        elif path == DOCS:
            await respond(self.app, scope, receive, send, 200, PAGE, kind=b"text/html; charset=utf-8")
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
        return appending(send, more + state_metrics(self.state.running(), self.state.draining).encode())

    def _description(self, app: Any) -> dict[str, Any]:
        draws, keys = self.settings.checkpoint is not None, bool(self.keys.clients or self.keys.named)
        return describe(app.openapi(), name=self.settings.name or "model", draws=draws, keys=keys)

    async def _until_ended(self, work: Any, path: str, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Do the work; when the server goes away first, end the answer with an error."""
        answer = Answer(send, path)
        working = asyncio.create_task(work(path, owner, scope, receive, answer.send))
        ended = asyncio.create_task(self.state.ended())
        try:
            await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
            if working.done() or ended.exception() is not None:  # a watch that failed ends nobody's request
                return await working
            await answer.end(Refused(503, _LEAVING, retry_after=_RETRY))
        finally:
            working.cancel()
            ended.cancel()

    async def _work(self, path: str, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that makes the engine work."""
        raw = await self.read_body(scope, receive)
        data, given = await self._admit(path, read_json(scope["headers"], raw), owner)
        if path == DRAW:
            request = self.drawings.request(data)
            drawn = await self.drawings.draw(engine_of(scope), request, receive)
            count_drawings(request.n)
            self._charge(owner, used(drawn))
            await respond(self.app, scope, receive, send, 200, drawn)
            return
        settings = data.get("mm_processor_kwargs") or {}
        with self.adapters.used(settings.get(ADAPTER, 0)):
            await self._engine_work(path, owner, data, given, scope, receive, send)

    async def _engine_work(
        self,
        path: str,
        owner: str,
        data: dict[str, Any],
        given: list[Picture],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """An admitted request, routed and handed on."""
        inner = handed_on(scope, path)
        weights = (data.get("mm_processor_kwargs") or {}).get("experts")
        if path == CHAT and weights is None and self.routes is not None and self.routes.needed(data):
            weights = await self.routes.decide(self.app, inner, data, receive)
            data["mm_processor_kwargs"] = {**(data.get("mm_processor_kwargs") or {}), "experts": weights}
        if weights is not None:
            count_experts(weights)
        send = shortening(send)
        if weights is not None:
            send = adding(send, partial(_choice_headers, weights))
        elif path == CHAT and self.routes is not None and given:
            adapter = (data.get("mm_processor_kwargs") or {}).get(ADAPTER, 0)
            asked = zip(given, pictures(data), strict=True)
            keys = [picture_key(picture.file, question, adapter) for picture, (_, question) in asked]
            send = adding(send, partial(self._chosen, scope, keys))
        if path == CHAT and not data.get("continue_final_message"):  # one that goes on may go on with a space
            inner, send = uncompressed(inner), FirstWord(send, data.get("n") or 1).send
        if path == CHAT and self.settings.heads is not None:
            inner, send = uncompressed(inner), self._with_heads(scope, data, given, send)
        if not self.limits.meters(owner):
            await self._hand_on(inner, data, receive, send)
            return
        meter = Meter(send, hide=_ask_for_usage(path, data))
        try:
            await self._hand_on(inner, data, receive, meter.send)
        finally:
            self._charge(owner, meter.tokens)

    def _with_heads(self, scope: Scope, data: dict[str, Any], given: list[Picture], send: Send) -> Send:
        """Have the engine's heads answer beside a chat's text."""
        heads = self.settings.heads
        assert heads is not None
        return HeadFields(
            send, heads, lambda asked: read_heads(engine_of(scope), asked), asked_of_heads(data, given, heads)
        ).send

    async def _hand_on(self, scope: Scope, data: dict[str, Any], receive: Receive, send: Send) -> None:
        body = write_json(data)
        await self.app(with_length(scope, len(body)), _replay(body, receive), send)

    def _charge(self, owner: str, tokens: int) -> None:
        self.limits.spend(owner, tokens)
        if owner in self.keys.named:
            count_client(owner, tokens=tokens)

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

    async def _chosen(self, scope: Scope, keys: list[int]) -> list[tuple[bytes, bytes]]:
        """The header with what the engine's router chose, once pictures were looked at; none where that is not known (an
        earlier request's features were used, and are long ago)."""
        try:
            chosen = await read_choices(engine_of(scope), keys)
        except Exception:  # an answer is worth more than the word of who looked
            return []
        if chosen is None:
            return []
        weights = [dict.fromkeys(names, 1.0) for names in chosen]
        count_experts(weights)
        return await _choice_headers(weights)

    async def admit(self, path: str, data: dict[str, Any], owner: str = "") -> dict[str, Any]:
        """The request as the engine may see it. Raises `Refused`."""
        return (await self._admit(path, data, owner))[0]

    async def _admit(self, path: str, data: dict[str, Any], owner: str) -> tuple[dict[str, Any], list[Picture]]:
        """`admit`, and its pictures."""
        fields = admitted_fields(path, data)
        heads = self.settings.heads
        shown_as = None if heads is None else heads.example
        content = Content(self.settings.image_token, videos=self.settings.max_videos > 0, example=shown_as)
        made = content.rewrite(path, fields)
        secret = secret_of(self.settings.salt, owner if self.keys.several else "")
        check_number(content.pictures, self.rules)
        if content.pictures:
            self.limits.take(owner, pictures=len(singly(content.pictures)))
            await fetch_pictures(content.pictures, self.rules)
            await asyncio.to_thread(write_pictures, content.pictures, self.rules, secret)
        count_pictures(len(content.pictures), path)
        self._check_prompt(made.get("prompt"))
        if path in (COMPLETIONS, CHAT):
            self._defaults(made)
        if path not in _UNSALTED:
            made["cache_salt"] = cache_salt(secret, fields.get("cache_salt"), self.adapters.number(made.get("model")))
        elif path == MESSAGES and self.adapters.was_another(made.get("model")):
            raise Refused(
                400, f"an earlier adapter had this name, and {path} cannot tell the two apart in caches; use {CHAT}"
            )
        self._settings(path, made, len(content.pictures))
        if content.pictures and path not in _COUNTED:
            self._visual_adapter(path, made)
        return made, content.pictures

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
        allowed, never = data.get("allowed_token_ids"), self.settings.image_token_id
        if isinstance(allowed, list) and never is not None and set(map(str, allowed)) <= {str(never)}:
            raise Refused(400, "allowed_token_ids: it leaves nothing to write; a picture's place is never written")
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

    def _visual_adapter(self, path: str, data: dict[str, Any]) -> None:
        """Tell the engine which adapter looks at the pictures."""
        number = self.adapters.visual(data.get("model"))
        if number and path not in (CHAT, RESPONSES):
            raise Refused(
                400, f"this adapter looks at pictures itself, which is told the engine for {CHAT} and {RESPONSES} only"
            )
        if number:
            data["mm_processor_kwargs"] = {**(data.get("mm_processor_kwargs") or {}), ADAPTER: number}

    def information(self) -> dict[str, Any]:
        """What a client can ask for: pictures and videos per request, how videos are seen, experts, who routes, whether it draws, and
        what heads answer."""
        router, heads = self.settings.router or {}, self.settings.heads
        return {
            "max_images": self.settings.max_images,
            "max_videos": self.settings.max_videos,
            "video": self.settings.video,
            "max_body_bytes": self.settings.max_body_bytes,
            "experts": list(router.get("experts", [])),
            "router": router.get("type"),
            "media_domains": self.settings.media_domains,
            "draws": self.settings.checkpoint is not None,
            "masks": heads is not None and heads.mark is not None,
            "probability": heads is not None and heads.probability,
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


def _ask_for_usage(path: str, data: dict[str, Any]) -> bool:
    """Have a stream end with its usage; returns whether the client did not ask for that."""
    if path not in (CHAT, COMPLETIONS) or not data.get("stream"):
        return False
    options = data.get("stream_options") or {}
    data["stream_options"] = {**options, "include_usage": True}
    return not options.get("include_usage")


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


async def _choice_headers(weights: list[dict[str, float]]) -> list[tuple[bytes, bytes]]:
    """The header with the experts that look at a request's pictures."""
    return [(b"x-mllm-experts", experts_header(weights).encode())]
