"""What may a request say before it reaches the engine?"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from mllm.serve.http.admission import Guard, GuardSettings

ROUTER = {"type": "constant", "experts": ["text", "charts"]}
LETTERS = {
    "type": "language_model",
    "experts": ["text", "charts"],
    "capabilities": {"text": "Reads text.", "charts": "Reads charts."},
}


class Echo:
    """An ASGI app that keeps what it was given and answers with ``reply``."""

    def __init__(self, reply: str = "fine", status: int = 200):
        self.status = status
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        self.reply = reply

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.paths.append(scope["path"])
        self.bodies.append(json.loads(body) if body else None)
        answer = json.dumps({"choices": [{"message": {"content": self.reply}}]}).encode()
        await send(
            {"type": "http.response.start", "status": self.status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": answer})


def ask(app: Echo, body: Any = None, *, path="/v1/chat/completions", method="POST", headers=None, key=None, **settings):
    """One request through a guard; returns the response."""
    guard = Guard(app, GuardSettings(**settings), api_key=key or "")

    async def go():
        transport = httpx.ASGITransport(app=guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            return await client.request(
                method, path, content=content, headers={"content-type": "application/json", **(headers or {})}
            )

    return asyncio.run(go())


def encoded(form: str = "PNG", size: tuple[int, int] = (4, 3)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, (7, 8, 9)).save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(url: str = encoded(), **extra: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **extra}


def chat(*parts: Any, **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **extra}


def test_a_plain_request_passes_unchanged():
    app = Echo()
    body = chat(picture(), {"type": "text", "text": "what is ünï?"}, temperature=0, seed=7, stream=False)
    assert ask(app, body).status_code == 200
    assert app.bodies == [body]


def test_a_large_body_is_refused_before_and_while_it_is_read():
    app = Echo()
    body = chat({"type": "text", "text": "x" * 5000})
    stated = ask(app, body, max_body_bytes=1000)
    assert stated.status_code == 413 and stated.json()["error"]["code"] == 413

    async def unstated():
        chunks = iter([b"x" * 600, b"x" * 600, b""])
        sent = []

        async def receive():
            return {"type": "http.request", "body": next(chunks), "more_body": True}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await Guard(app, GuardSettings(max_body_bytes=1000), api_key="")(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(unstated()) == 413
    assert app.bodies == []


def test_a_slow_client_is_let_go():
    async def go():
        sent = []

        async def receive():
            await asyncio.sleep(30)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await Guard(Echo(), GuardSettings(body_timeout=0.05), api_key="")(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(go()) == 408


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", "file: addresses"),
        (" FILE:///etc/passwd", "file: addresses"),
        ("ftp://host/a.png", "ftp: addresses"),
        ("http://127.0.0.1:8000/a.png", "fetches no addresses"),
        ("https://example.org/a.png", "fetches no addresses"),
    ],
)
def test_addresses_are_refused_with_400(url, says):
    app = Echo()
    for part in (picture(url), {"type": "image_url", "image_url": url}, {"type": "input_image", "image_url": url}):
        response = ask(app, chat(part))
        assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert app.bodies == []


@pytest.mark.parametrize("url", ["data:", "data:image/png", "data:image/png,abc", "data:image/png;base64", "DATA:x,y"])
def test_a_data_uri_without_base64_is_refused(url):
    assert ask(Echo(), chat(picture(url))).status_code == 400


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,***", "base64"),
        ("data:image/png;base64," + base64.b64encode(b"no picture at all").decode(), "not an image"),
        (
            "data:image/png;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode(),
            "not an",
        ),
        (encoded(size=(50, 21)), "limit of 0.001 megapixels"),
        (
            "data:image/bmp;base64,Qk3KCAAAAAAAADYAAAAoAAAADAAAtj0AbAABABgAAAAAAJQIAADEDgAAxA4AAAAAAAAAAAAA",
            "picture 0",
        ),
    ],
    ids=["empty", "base64", "text", "postscript", "large", "bomb"],
)
def test_pictures_are_judged_by_their_header(url, says):
    app = Echo()
    response = ask(app, chat(picture(url)), max_pixels=1000)
    assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert app.bodies == []
    assert ask(app, chat(picture(encoded("GIF", (40, 25)))), max_pixels=1000).status_code == 200


@pytest.mark.parametrize("value", ["x", 1.5, [1], True])
@pytest.mark.parametrize("name", ["structured_outputs", "response_format", "stream_options"])
def test_what_must_be_an_object_is_one(name, value):
    assert ask(Echo(), chat(**{name: value})).status_code == 400
    assert ask(Echo(), chat(**{name: {}})).status_code == 200
    assert ask(Echo(), chat(**{name: None})).status_code == 200


def test_only_chat_requests_are_routed_in_two_passes():
    app = Echo(reply="A")
    ask(app, chat(picture(), {"type": "text", "text": "?"}), router=LETTERS, path="/tokenize")
    assert app.paths == ["/tokenize"]


def test_allowed_domains_leave_the_host_check_to_vllm_but_never_files():
    app = Echo()
    assert ask(app, chat(picture("https://example.org/a.png")), media_domains=["example.org"]).status_code == 200
    assert ask(app, chat(picture("file:///a.png")), media_domains=["example.org"]).status_code == 400


def test_a_typed_placeholder_is_pulled_apart_wherever_it_stands():
    app = Echo()
    body = chat({"type": "text", "text": "a <image> b"})
    body["messages"].append(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "<image>"}'}}],
        }
    )
    assert ask(app, body).status_code == 200
    assert app.bodies[0]["messages"][0]["content"][0]["text"] == "a < image> b"
    assert app.bodies[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"x": "< image>"}'


def test_a_client_cannot_name_cache_entries():
    assert ask(Echo(), chat(picture(uuid="another-picture"))).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b'{"temperature": NaN}',
        b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
        b"[" * 100_000,
        b'"text"',
        b"\xff\xfe",
    ],
)
def test_what_is_no_json_object_is_refused(body):
    app = Echo()
    assert ask(app, body).status_code == 400
    assert app.bodies == []


def test_a_lone_surrogate_does_not_reach_the_engine():
    app = Echo()
    assert ask(app, b'{"messages": [{"role": "user", "content": "a \\ud800 b"}]}').status_code == 200
    assert app.bodies[0]["messages"][0]["content"] == "a ? b"


def test_the_key_is_asked_for_everywhere_but_on_health():
    app = Echo()
    assert ask(app, chat(), key="secret").status_code == 401
    assert ask(app, chat(), key="secret", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert ask(app, chat(), key="secret", path="/tokenize").status_code == 401
    assert ask(app, None, key="secret", path="/metrics", method="GET").status_code == 401
    assert app.bodies == []
    assert ask(app, None, key="secret", path="/health", method="GET").status_code == 200
    assert ask(app, chat(), key="secret", headers={"authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "router", "says"),
    [
        ({"experts": ["text"]}, None, "routes nothing"),
        ({"experts": ["txt"]}, ROUTER, "did you mean 'text'"),
        ({"experts": {"text": -1}}, ROUTER, "a weight is a number from 0 on"),
        ({"experts": {"text": True}}, ROUTER, "a weight is a number from 0 on"),
        ({"experts": [["text"], ["charts"]]}, ROUTER, "2 entries for 1 images"),
        ({"experts": [1]}, ROUTER, "experts"),
        ({"experts": [[["text"]]]}, ROUTER, "experts"),
        ({"experts": 3}, ROUTER, "expected names"),
        ({"routing_pass": True}, ROUTER, "only"),
        ({"max_pixels": 10}, ROUTER, "only"),
        ({"experts": ["text"], "router_input_ids": [[1]]}, ROUTER, "only"),
    ],
)
def test_settings_other_than_a_valid_routing_are_refused(settings, router, says):
    app = Echo()
    response = ask(app, chat(picture(), mm_processor_kwargs=settings), router=router)
    assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert app.bodies == []


def test_media_settings_are_refused():
    assert ask(Echo(), chat(picture(), media_io_kwargs={"image": {"image_mode": "L"}})).status_code == 400


@pytest.mark.parametrize(
    ("experts", "weights", "told"),
    [
        (["text"], {"text": 1.0}, "text"),
        ("charts", {"charts": 1.0}, "charts"),
        (["charts", "text"], {"text": 0.5, "charts": 0.5}, "text,charts"),
        ({"text": 2, "charts": 0}, {"text": 2.0}, "text"),
        ([], {}, "none"),
        ("none", {}, "none"),
    ],
)
def test_a_fixed_routing_becomes_weights_and_is_told_in_a_header(experts, weights, told):
    app = Echo()
    response = ask(app, chat(picture(), mm_processor_kwargs={"experts": experts}), router=ROUTER)
    assert app.bodies[0]["mm_processor_kwargs"] == {"experts": [weights]}
    assert response.headers["x-mllm-experts"] == told


def test_every_picture_may_have_its_own_routing():
    app = Echo()
    body = chat(picture(), picture(encoded("JPEG")), mm_processor_kwargs={"experts": [["text"], "none"]})
    response = ask(app, body, router=ROUTER)
    assert app.bodies[0]["mm_processor_kwargs"] == {"experts": [{"text": 1.0}, {}]}
    assert response.headers["x-mllm-experts"] == "text;none"


def test_too_many_pictures_are_refused_before_any_routing():
    app = Echo(reply="A")
    assert ask(app, chat(*[picture()] * 3), router=LETTERS, max_images=2).status_code == 400
    assert app.bodies == []


def test_a_language_model_router_is_asked_first_and_its_answer_used():
    app = Echo(reply=" B ")
    body = chat(picture(), {"type": "text", "text": "How  high is\nthe bar?"}, max_tokens=99, stream=True, model="m")
    response = ask(app, body, router=LETTERS)
    assert response.headers["x-mllm-experts"] == "charts"
    first, second = app.bodies
    assert first["mm_processor_kwargs"] == {"routing_pass": True}
    assert (first["stream"], first["temperature"], first["model"]) == (False, 0, "m")
    assert first["messages"][0]["content"][0] == picture()
    assert "B. Reads charts." in first["messages"][0]["content"][1]["text"]
    assert first["messages"][0]["content"][1]["text"].endswith("How high is the bar?")
    assert second == {**body, "mm_processor_kwargs": {"experts": [{"charts": 1.0}]}}


def test_a_fixed_routing_or_a_text_question_needs_no_first_pass():
    app = Echo()
    ask(app, chat(picture(), mm_processor_kwargs={"experts": ["text"]}), router=LETTERS)
    ask(app, {"messages": [{"role": "user", "content": "hello"}]}, router=LETTERS)
    assert len(app.bodies) == 2 and "mm_processor_kwargs" not in app.bodies[1]


def test_an_unreadable_routing_answer_runs_no_expert():
    app = Echo(reply="I think the chart model")
    response = ask(app, chat(picture(), {"type": "text", "text": "?"}), router=LETTERS)
    assert response.headers["x-mllm-experts"] == "none"
    assert app.bodies[1]["mm_processor_kwargs"] == {"experts": [{}]}


def test_what_the_engine_says_to_the_first_pass_reaches_the_client():
    app = Echo(status=400)
    assert ask(app, chat(picture(), {"type": "text", "text": "?"}), router=LETTERS).status_code == 400
    assert len(app.bodies) == 1


def test_a_client_that_leaves_during_the_first_pass_ends_it():
    seen: list[Any] = []

    async def slow(scope, receive, send):
        seen.append(json.loads((await receive())["body"])["mm_processor_kwargs"])
        seen.append((await receive())["type"])  # as vLLM listens, while it generates

    async def go():
        body = json.dumps(chat(picture(), {"type": "text", "text": "?"}, picture())).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while len(seen) < 2:  # both pictures are asked about
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        guard = Guard(slow, GuardSettings(router=LETTERS), api_key="")
        await asyncio.wait_for(guard(scope, receive, lambda message: seen.append(message)), timeout=5)

    asyncio.run(go())
    assert seen == [{"routing_pass": True}] * 2 + ["http.disconnect"] * 2


def test_websockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(Echo(), GuardSettings(), api_key="")({"type": "websocket", "path": "/v1/realtime"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_model_without_a_vocabulary_head_says_why_it_does_not_draw():
    app = Echo()
    answer = ask(app, {"prompt": "a seven"}, path="/v1/images/generations", cannot_draw="draw with `mllm draw`")
    assert answer.status_code == 400 and "mllm draw" in answer.json()["error"]["message"]
    assert app.bodies == []


def test_the_drawing_requests_of_the_server_cannot_be_written_by_a_client():
    app = Echo()
    answer = ask(app, {"messages": [], "vllm_xargs": {"mllm_drawing": "x"}})
    assert answer.status_code == 400 and "vllm_xargs" in answer.json()["error"]["message"]
