"""May a client use what its key allows, and no more?"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mllm.errors import ConfigError
from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.errors import Refused, shortened
from mllm.serve.http.keys import Client, Keys, read_clients
from mllm.serve.http.limits import Limits, Meter, used
from tests.unit.serve.test_admission import Echo, chat, names, picture

KEYS = {
    "few": Client(key="few-requests", requests=2),
    "seen": Client(key="few-pictures", pictures=3),
    "free": Client(key="no-limits-at-all"),
}


def send(app, requests, **settings):
    """Requests ``(key, body)`` one after the other through one admission."""
    admission = Admission(app, AdmissionSettings(**settings), Keys([], named=KEYS))

    async def go():
        transport = httpx.ASGITransport(app=admission)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [
                await client.post("/v1/chat/completions", json=body, headers={"x-api-key": key})
                for key, body in requests
            ]

    return asyncio.run(go())


def test_each_key_has_its_own_minute():
    answers = send(Echo(), [("few-requests", chat("a"))] * 3 + [("no-limits-at-all", chat("a"))] * 3)
    assert [answer.status_code for answer in answers] == [200, 200, 429, 200, 200, 200]
    refused = answers[2]
    assert 1 <= int(refused.headers["retry-after"]) <= 30 and "2 requests a minute" in refused.text
    assert refused.json()["error"]["type"] == "RateLimitError"


def test_every_client_with_a_name_is_counted_whatever_its_limits(monkeypatch):
    """Requests and tokens: only of those whose tokens are limited they were."""
    counted = Counter()

    def count(name, *, requests=0, tokens=0):
        counted.update({(name, "requests"): requests, (name, "tokens"): tokens})

    monkeypatch.setattr("mllm.serve.http.admission.count_client", count)
    app = Streams()
    send(app, [(key, chat("a", stream=True)) for key in ("no-limits-at-all", "few-requests", "few-requests")])
    assert counted == {("free", "requests"): 1, ("free", "tokens"): 43, ("few", "requests"): 2, ("few", "tokens"): 86}


def test_pictures_are_counted_one_by_one_and_more_than_a_minutes_never_pass():
    two, four = chat(picture(), picture()), chat(*[picture()] * 4)
    answers = send(Echo(), [("few-pictures", body) for body in (two, two, chat(picture()), chat("a"), four)])
    assert [answer.status_code for answer in answers] == [200, 429, 200, 200, 400]


def test_clients_with_names_share_no_cache_names():
    app = Echo()
    send(app, [("few-requests", chat(picture())), ("few-pictures", chat(picture())), ("few-pictures", chat(picture()))])
    first, second, again = (names(app, index) for index in range(3))
    assert first[0] != second[0] and first[1] != second[1] and second == again


def test_a_bucket_refills_in_a_minute_and_is_shared_by_processes(tmp_path):
    now = [1000.0]
    clients = {"a": Client(key="x" * 8, requests=60, tokens=600)}
    one, other = (Limits(clients, str(tmp_path), clock=lambda: now[0]) for _ in range(2))
    with ThreadPoolExecutor(8) as pool:  # two processes' worth of contention on one file
        list(pool.map(lambda n: (one, other)[n % 2].take("a", requests=1), range(60)))
    for limits in (one, other):
        with pytest.raises(Refused) as refused:
            limits.take("a", requests=1)
        assert (refused.value.status, refused.value.retry_after) == (429, 1)
    now[0] += 10
    for _ in range(10):
        other.take("a", requests=1)
    with pytest.raises(Refused):
        one.take("a", requests=1)
    now[0] += 60
    one.spend("a", 1100)  # an answer may owe tokens
    with pytest.raises(Refused, match="600 tokens a minute; again in 51 s"):
        other.take("a", requests=1)
    now[0] += 51
    other.take("a", requests=1)


class Streams:
    """An engine that streams three words, and its usage where it was asked for it."""

    def __init__(self):
        self.asked: list[dict] = []

    async def __call__(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        self.asked.append(body)
        events = [{"choices": [{"delta": {"content": word}}]} for word in "abc"]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43}})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for place in range(0, len(text), 7):  # cut anywhere
            await send({"type": "http.response.body", "body": text[place : place + 7].encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("asked", [None, {"include_usage": True}])
def test_a_streams_tokens_are_counted_though_its_client_did_not_ask_for_them(monkeypatch, asked):
    monkeypatch.setitem(KEYS, "tokens", Client(key="few-tokens", tokens=50))
    app = Streams()
    extra = {"stream_options": asked} if asked else {}
    answers = send(app, [("few-tokens", chat("a", stream=True, **extra))] * 3)
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert ('"usage"' in answers[0].text) == bool(asked)
    assert answers[0].text.count("content") == 3 and answers[0].text.endswith("data: [DONE]\n\n")
    assert all(body["stream_options"]["include_usage"] for body in app.asked)


def test_a_stream_that_breaks_off_costs_what_was_sent():
    async def go():
        async def nowhere(message):
            pass

        meter = Meter(nowhere, hide=True)
        await meter.send({"type": "http.response.start", "headers": [(b"content-type", b"text/event-stream")]})
        await meter.send(
            {"type": "http.response.body", "body": b'data: {"a": 1}\n\ndata: {"a": 2}\n\n', "more_body": True}
        )
        return meter.tokens

    assert asyncio.run(go()) == 2


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"usage": {"prompt_tokens": 4, "total_tokens": 9}}, 9),
        ({"usage": {"input_tokens": 4, "output_tokens": 3}}, 7),
        ({"response": {"usage": {"total_tokens": 5}}}, 5),
        ({"choices": []}, 0),
        ([1], 0),
    ],
)
def test_usage_is_read_in_every_form(body, tokens):
    assert used(json.dumps(body).encode()) == tokens


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a line for each client"),
        ("a: {key: short-12}\nb: {key: short-12}", "the same key"),
        ("a: {key: 1234567890}", "in quotes"),
        ("a: {key: hush}", "8 characters"),
        ("operator: {key: long-enough}", "cannot be a client's name"),
        ("7: {key: long-enough}", "cannot be a client's name"),
        ("a: {key: long-enough, request: 5}", "requests"),
        ("a: {key: long-enough, tokens: 0}", "tokens"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_told_without_the_key(tmp_path, text, says):
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        read_clients(file)
    assert "hush" not in str(error.value) and "1234567890" not in str(error.value)


def test_the_engines_refusals_repeat_at_most_80_characters():
    long = "A" * 5000
    app = Echo(reply=long, status=400)
    answer = send(app, [("no-limits-at-all", chat("a", model="x"))])[0]
    assert answer.status_code == 400 and "A" * 79 in answer.text and "A" * 80 not in answer.text
    assert int(answer.headers["content-length"]) == len(answer.content)
    fine = json.dumps({"error": {"message": "what is wrong, and where"}}).encode()
    dead = b'{"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause."}}'
    assert b"the engine has died" in shortened(dead) and b"above" not in shortened(dead)
    assert shortened(fine) == fine and len(shortened(b"word " * 1000)) < 700
