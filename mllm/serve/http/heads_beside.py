"""How do masks and probabilities come into an answer? The engine's heads are asked once its text is whole, and the answer gets fields."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from mllm.serve.heads import KEY, ServedHeads
from mllm.serve.http.answering import Changed, Send
from mllm.serve.http.content import Picture
from mllm.serve.http.errors import Refused

_log = logging.getLogger("vllm.mllm")
MASKS, PROBABILITY = "mllm_masks", "mllm_probability"
"""Fields of an answer, beside OpenAI's ``choices``; in a stream they come in a chunk of their own, without choices, before its end."""
_DONE = b"data: [DONE]"
Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]


def name_request(data: dict[str, Any]) -> str:
    """Have the engine keep what heads need of a chat's answer; returns the name to ask by. Raises `Refused` for several answers."""
    if (data.get("n") or 1) > 1:
        raise Refused(
            400, "n: this model's heads answer beside the text, for one answer a request; send several requests"
        )
    key = uuid.uuid4().hex
    data["vllm_xargs"] = {KEY: key}
    return key


def last_question(data: Mapping[str, Any]) -> str:
    """The text of a chat's last user message."""
    messages = [m for m in data.get("messages") or [] if isinstance(m, Mapping) and m.get("role") == "user"]
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return content.strip()
    texts = [part.get("text") for part in content or [] if isinstance(part, Mapping) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def asked_of_heads(data: dict[str, Any], pictures: Sequence[Picture], heads: ServedHeads) -> dict[str, Any]:
    """What `HeadsInEngine.answer` must know of a chat beside the answer's text; names the request (`name_request`). The last picture is
    what the answer is about, and the last one with a mask what it goes by."""
    question = last_question(data)
    example = next((one for one in reversed(pictures) if one.mask is not None), None)
    return {
        "key": name_request(data),
        "question": question if heads.example is None else question.replace(heads.example, "").strip(),
        "picture": pictures[-1].file if pictures else None,
        "example": None if example is None else {"picture": example.file, "mask": example.mask},
    }


class HeadFields(Changed):
    """Puts the fields into an answer.

    send: where it goes; heads: what the server answers with; ask: the engine, by the request that `HeadsInEngine.answer` takes; request:
    that request without the answer's text.
    """

    def __init__(self, send: Send, heads: ServedHeads, ask: Ask, request: dict[str, Any]):
        super().__init__(send)
        self._heads, self._ask, self._request, self._text = heads, ask, request, ""

    async def whole(self, body: bytes) -> bytes:
        answer = json.loads(body)
        self._text = (answer["choices"][0].get("message") or {}).get("content") or ""
        return json.dumps(answer | await self._fields(), ensure_ascii=False).encode()

    async def event(self, event: bytes) -> bytes:
        if event.strip() != _DONE:
            self._text += _said(event)
            return event
        chunk = {"object": "chat.completion.chunk", "choices": [], **await self._fields()}
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" + event

    async def _fields(self) -> dict[str, Any]:
        """The fields of this answer; null where the engine does not know it any more."""
        wanted = {MASKS: self._heads.mark is not None, PROBABILITY: self._heads.probability}
        try:
            found = await self._ask({**self._request, "text": self._text})
        except Exception:  # the text is there, and is worth sending
            _log.warning("The heads gave no answer", exc_info=True)
            found = None
        values = {MASKS: (found or {}).get("masks"), PROBABILITY: (found or {}).get("probability")}
        return {name: values[name] for name, given in wanted.items() if given}


def _said(event: bytes) -> str:
    """The text of one event of a chat's stream."""
    if not event.startswith(b"data: {"):
        return ""
    choices = json.loads(event.removeprefix(b"data: ")).get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""
