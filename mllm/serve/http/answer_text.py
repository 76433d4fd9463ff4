"""How does a served answer begin with its first word, as `generate`'s do where they are shown?

Chat templates write a space before an answer ("ASSISTANT: It is …"), which belongs to its first token. `segment`, `mllm chat` and the
evaluation leave it out; vLLM hands it on.
"""

from __future__ import annotations

import json

from mllm.serve.http.answering import Changed, Send

_DATA = b"data: {"


class FirstWord(Changed):
    """Takes the white space before a chat's answers out of them. choices: answers a request."""

    def __init__(self, send: Send, choices: int = 1):
        super().__init__(send)
        self._choices = choices
        self._begun: set[int] = set()

    async def whole(self, body: bytes) -> bytes:
        return _without_space(body, "message", set())

    async def event(self, event: bytes) -> bytes:
        if not event.startswith(_DATA) or len(self._begun) >= self._choices:
            return event
        return b"data: " + _without_space(event.removeprefix(b"data: "), "delta", self._begun)


def _without_space(body: bytes, part: str, begun: set[int]) -> bytes:
    """An answer or a piece of one whose choices begin with a word, as it is where they do. begun: the choices that have begun."""
    if b'"content"' not in body:
        return body
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
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() if changed else body
