"""Does a served answer begin with its first word, whole and in pieces?"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from mllm.serve.http.answer_text import FirstWord


def through(chunks: list[bytes], kind: bytes, choices: int = 1) -> list[dict[str, Any]]:
    """What a client gets of an answer in these pieces."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        first = FirstWord(send, choices)
        headers = [(b"content-type", kind), (b"content-length", b"5")]
        await first.send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, chunk in enumerate(chunks):
            await first.send({"type": "http.response.body", "body": chunk, "more_body": number < len(chunks) - 1})

    asyncio.run(run())
    return sent


def test_a_whole_answer_begins_with_its_first_word() -> None:
    body = json.dumps(
        {"choices": [{"message": {"content": " It is\n [SEG]. "}}, {"index": 1, "message": {"content": None}}]}
    ).encode()
    start, answer = through([body[:11], body[11:]], b"application/json")
    assert json.loads(answer["body"])["choices"][0]["message"]["content"] == "It is\n [SEG]. "
    assert dict(start["headers"])[b"content-length"] == str(len(answer["body"])).encode()
    for same in (b'{"choices":[{"message":{"content":"yes"}}]}', b'{"choices": []}', b"not json"):
        start, answer = through([same], b"application/json")
        assert answer["body"] == same and dict(start["headers"])[b"content-length"] == b"5"


def test_a_stream_begins_with_its_first_word_wherever_it_is_cut() -> None:
    pieces = [(0, ""), (1, " "), (0, " "), (0, "\n It"), (1, "No"), (0, " is"), (1, " one")]
    events = [b"data: " + json.dumps({"choices": [{"index": i, "delta": {"content": t}}]}).encode() for i, t in pieces]
    body = b"\n\n".join([*events, b"data: [DONE]", b""])
    for cut in (1, 30, len(body) - 1):
        sent = through([body[:cut], body[cut:]], b"text/event-stream", choices=2)
        got = b"".join(message["body"] for message in sent[1:]).split(b"\n\n")
        assert got[-2:] == [b"data: [DONE]", b""]
        texts = ["", ""]
        for event in got[:-2]:
            (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
            texts[choice["index"]] += choice["delta"]["content"]
        assert texts == ["It is", "No one"]
