"""Which experts look at a request's pictures, when the client or the language model itself decides it?"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

from mllm.models.routing import ANSWER_TOKENS
from mllm.processing.questions import question_text
from mllm.routers.build import build_router, router_config
from mllm.routers.fixed import fixed_weights_of
from mllm.serve.http.answering import with_length
from mllm.serve.http.reading import write_json
from mllm.types import IMAGE_MARK

_log = logging.getLogger("vllm.mllm")
_KEPT = ("model", "chat_template_kwargs", "cache_salt", "user", "priority")
Weights = list[dict[str, float]]


class ClientGone(Exception):
    """The client went away before its answer began."""


class FirstPassFailed(Exception):
    """The engine refused the routing request; the client gets that answer."""

    def __init__(self, status: int, body: bytes):
        super().__init__(f"routing request: status {status}")
        self.status, self.body = status, body


class Routes:
    """Routing at serving time, above the engine: checks fixed experts and makes the first of two passes.

    vLLM runs encoders without knowing of conversations, so a ``language_model`` router is two requests behind one: the
    first asks, with a short image and no expert, which experts help; its answer is a field of the second. As
    `mllm.models.routing.ask_language_model`, picture by picture. The first goes to vLLM's own endpoint, not to its engine:
    chat templates and their arguments, adapters, the fetching of pictures and refusals stay vLLM's, as for the second. The
    engine's client takes token ids and decoded pictures, and what makes these of a chat request has another name in every few
    versions of vLLM; the endpoint has not. Drawings have no endpoint and are token ids from the start: they go to the client
    (`mllm.serve.images.api`).
    """

    def __init__(self, router: Mapping[str, Any]):
        self.config = router_config(dict(router), "router")
        self.experts: list[str] = list(self.config.experts)
        self.two_passes = self.config.type == "language_model"
        self.router: Any = build_router(self.config, 0, 0) if self.two_passes else None

    def check(self, experts: Any, num_images: int) -> Weights:
        """A client's routing (names, name → weight, ``"none"``, or one of these per picture) as weights per picture.
        Raises `ConfigError` or `AlignmentError` saying what is wrong."""
        weights = fixed_weights_of(experts, self.experts, num_images)
        return [{name: w for name, w in zip(self.experts, row) if w} for row in weights.tolist()]

    def needed(self, data: Mapping[str, Any]) -> bool:
        """Whether a request must be routed by the language model first."""
        return self.two_passes and bool(pictures(data))

    async def decide(self, app: Any, scope: MutableMapping[str, Any], data: Mapping[str, Any], receive: Any) -> Weights:
        """Make the first pass, for all pictures at once. receive: tells when the client goes away, which ends it. Raises
        `FirstPassFailed` and `ClientGone`."""
        bodies = [self.first_pass(data, part, question) for part, question in pictures(data)]
        left = asyncio.create_task(disconnected(receive))
        try:
            answers = await asyncio.gather(*(_call(app, scope, body, left) for body in bodies))
            if left.done():
                raise ClientGone
        finally:
            left.cancel()
        chosen: list[str] = []
        for status, body in answers:
            if status != 200:
                raise FirstPassFailed(status, body)
            chosen.append((json.loads(body)["choices"][0]["message"]["content"] or "").strip())
        routing, _ = self.router.decide(chosen)
        return [{name: w for name, w in zip(self.experts, row) if w} for row in routing.weights.tolist()]

    def first_pass(self, data: Mapping[str, Any], picture: Mapping[str, Any], question: str) -> dict[str, Any]:
        """The routing request of one picture."""
        content = [picture, {"type": "text", "text": self.router.prompt(question)}]
        return {
            **{key: data[key] for key in _KEPT if key in data},
            "messages": [{"role": "user", "content": content}],
            "mm_processor_kwargs": {**(data.get("mm_processor_kwargs") or {}), "routing_pass": True},
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
            "stream": False,
        }


def experts_header(weights: Weights) -> str:
    """A routing for the response header: experts by comma, pictures by semicolon where they differ."""
    shown = [",".join(row) or "none" for row in weights]
    return shown[0] if len(set(shown)) == 1 else ";".join(shown)


def pictures(data: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """Every picture of an admitted chat request (`Content`) with the question of its turn."""
    messages = data.get("messages")
    found: list[tuple[Mapping[str, Any], str]] = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
        turn = "".join(IMAGE_MARK if _is_picture(part) else _text(part) for part in parts)
        question = question_text(turn, IMAGE_MARK)
        found += [(part, question) for part in parts if _is_picture(part)]
    return found


def _is_picture(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image_url"


def _text(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    return text if isinstance(text, str) else ""


async def disconnected(receive: Any) -> None:
    """Returns when the client has gone away; never where that cannot be told, since whoever waits takes the return for it."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception:
        _log.warning("Whether a client has gone away cannot be told; its request is worked to the end", exc_info=True)
        await asyncio.get_running_loop().create_future()


async def _call(
    app: Any, scope: MutableMapping[str, Any], data: dict[str, Any], left: asyncio.Task[None]
) -> tuple[int, bytes]:
    """Ask the wrapped app itself; returns status and body. It is told that the client went away when ``left`` ends."""
    body = write_json(data)
    dropped = (b"transfer-encoding", b"x-request-id")
    headers = [(k, v) for k, v in scope["headers"] if k.lower() not in dropped]
    inner = with_length({**scope, "headers": headers}, len(body))
    sent = False
    status, answer = 500, bytearray()

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.wait([left])
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            answer.extend(message.get("body", b""))

    await app(inner, receive, send)
    return status, bytes(answer)
