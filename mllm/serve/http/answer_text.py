"""How does a served answer begin with its first word, as `generate`'s do where they are shown?

Chat templates write a space before an answer ("ASSISTANT: It is …"), which belongs to its first token. `segment`, `mllm chat` and the
evaluation leave it out; vLLM hands it on.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any


class FirstWord:
    """Takes the white space before a chat's answers out of them as they pass. send: where they go; choices: answers a request."""

    def __init__(self, send: Any, choices: int = 1):
        self._send, self._choices = send, choices
        self._start: MutableMapping[str, Any] | None = None
        self._stream, self._body = False, bytearray()
        self._begun: set[int] = set()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Hand on a message of the answer."""
        if message["type"] == "http.response.start" and message["status"] == 200:
            kinds = [value for name, value in message.get("headers", []) if name.lower() == b"content-type"]
            self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
            self._start = message
            if self._stream:
                await self._send(message)
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        elif self._stream:
            await self._send({**message, "body": self._events(message.get("body", b""), not message.get("more_body"))})
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._whole(message)

    async def _whole(self, message: MutableMapping[str, Any]) -> None:
        assert self._start is not None
        body, start = bytes(self._body), self._start
        made = _without_space(body, "message", set())
        if made is not None:
            headers = [pair for pair in start.get("headers", []) if pair[0].lower() != b"content-length"]
            body, start = made, {**start, "headers": [*headers, (b"content-length", str(len(made)).encode())]}
        await self._send(start)
        await self._send({**message, "body": body})

    def _events(self, body: bytes, last: bool) -> bytes:
        self._body += body
        *events, rest = bytes(self._body).split(b"\n\n")
        self._body = bytearray(rest)
        passed = bytearray()
        for event in events:
            made = None
            if event.startswith(b"data: {") and len(self._begun) < self._choices:
                made = _without_space(event.removeprefix(b"data: "), "delta", self._begun)
            passed += (event if made is None else b"data: " + made) + b"\n\n"
        return bytes(passed + self._body) if last else bytes(passed)


def _without_space(body: bytes, part: str, begun: set[int]) -> bytes | None:
    """An answer or a piece of one whose choices begin with a word; None where nothing is to change. begun: the choices that have begun."""
    if b'"content"' not in body:
        return None
    answer = json.loads(body)
    changed = False
    for choice in answer.get("choices") or []:
        said = choice.get(part) or {}
        text = said.get("content")
        if not isinstance(text, str) or not text or choice.get("index", 0) in begun:
            continue
        said["content"] = text.lstrip()
        changed |= said["content"] != text
        if said["content"]:
            begun.add(choice.get("index", 0))
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() if changed else None
