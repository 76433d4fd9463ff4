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

from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.keys import Keys

ROUTER = {"type": "constant", "experts": ["text", "charts"]}
JSON = [(b"content-type", b"application/json")]
LETTERS = {
    "type": "language_model",
    "experts": ["text", "charts"],
    "capabilities": {"text": "Reads text.", "charts": "Reads charts."},
}


class Echo:
    """An ASGI app that keeps what it was given (``bodies``: without cache names) and answers with ``reply``."""

    def __init__(self, reply: str = "fine", status: int = 200):
        self.status = status
        self.raw: list[Any] = []
        self.bodies: list[Any] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        self.reply = reply

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.paths.append(scope["path"])
        self.headers.append(scope["headers"])
        self.raw.append(json.loads(body) if body else None)
        self.bodies.append(without_names(self.raw[-1]))
        answer = json.dumps({"choices": [{"message": {"content": self.reply}}]}).encode()
        await send(
            {"type": "http.response.start", "status": self.status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": answer})


def without_names(value: Any) -> Any:
    """A body as clients write it: the server's cache names left out."""
    if isinstance(value, dict):
        return {name: without_names(item) for name, item in value.items() if name not in ("uuid", "cache_salt")}
    return [without_names(item) for item in value] if isinstance(value, list) else value


def names(app: Echo, request: int) -> tuple[list[str], str]:
    """The cache names of a request's pictures, and the salt of its prefix."""
    body = app.raw[request]
    parts = [part for message in body["messages"] for part in message["content"] if part["type"] == "image_url"]
    return [part["uuid"] for part in parts], body["cache_salt"]


def ask(
    app: Echo, body: Any = None, *, path="/v1/chat/completions", method="POST", headers=None, keys=None, **settings
):
    """One request through the admission; returns the response."""
    admission = Admission(app, AdmissionSettings(**settings), keys or Keys([]))

    async def go():
        transport = httpx.ASGITransport(app=admission)
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

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": JSON}
        await Admission(app, AdmissionSettings(max_body_bytes=1000), Keys([]))(scope, receive, send)
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

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": JSON}
        await Admission(Echo(), AdmissionSettings(body_timeout=0.05), Keys([]))(scope, receive, send)
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


@pytest.mark.parametrize(
    "part",
    [
        picture(uuid="another-picture"),
        {"image_url": {"url": encoded()}, "uuid": "another-picture"},
        {"image_url": encoded(), "uuid": "another-picture"},
        {"image_url": None, "uuid": "another-picture"},
        {"type": "image_url", "image_url": None, "uuid": "another-picture"},
        {"image_url": {"url": None}, "uuid": "another-picture"},
        {"type": "image_url", "image_url": {"url": encoded(), "uuid": "another-picture"}},
        {"type": "input_image", "image_url": encoded(), "uuid": "another-picture"},
        {"type": "text", "text": "x", "image_url": {"url": encoded()}, "uuid": "another-picture"},
        {"image_pil": None, "uuid": "another-picture"},
        {"type": "image_embeds", "image_embeds": None, "uuid": "another-picture"},
    ],
)
def test_a_client_cannot_name_cache_entries(part):
    app = Echo()
    assert ask(app, chat(part, {"type": "text", "text": "?"})).status_code == 400
    assert app.bodies == []


@pytest.mark.parametrize("address", [None, "", "  ", 7, {"url": None}, {}, []])
def test_a_picture_without_an_address_is_refused(address):
    app = Echo()
    for part in ({"type": "image_url", "image_url": address}, {"image_url": address}):
        assert ask(app, chat(part)).status_code == 400
    assert app.bodies == []


def test_parts_in_every_accepted_form_become_one():
    app, url = Echo(), encoded()
    forms = [
        picture(url),
        {"image_url": {"url": url, "detail": "low"}},
        {"image_url": url},
        {"type": "image_url", "image_url": " " + url.replace("data:image/png", "DATA:image/PNG") + "\n"},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    for part in forms:
        assert ask(app, chat(part, {"text": "?", "cache_control": {}}, "and?"), salt="s").status_code == 200
        texts = [{"type": "text", "text": text} for text in ("?", "and?")]
        assert app.bodies[-1] == chat(picture(url), *texts)
        assert app.raw[-1] == app.raw[0]


def test_cache_names_are_the_servers_and_the_keys_own():
    app, keys = Echo(), Keys(["one", "two"])
    ask(app, chat(picture(), picture(encoded(size=(5, 5)))), salt="a")
    ask(app, chat(picture()), salt="b")
    ask(app, chat(picture()), salt="a", keys=keys, headers={"authorization": "Bearer one"})
    ask(app, chat(picture()), salt="a", keys=keys, headers={"x-api-key": "two"})
    (first, other), salt = names(app, 0)
    assert len({first, other, *(names(app, number)[0][0] for number in (1, 2, 3))}) == 5
    assert len({salt, *(names(app, number)[1] for number in (1, 2, 3))}) == 4
    ask(app, chat(picture()), salt="a")
    assert names(app, 4) == ([first], salt)


@pytest.mark.parametrize(
    "kind",
    ["application/JSON", "Application/json; charset=UTF-8", 'application/json;charset="utf-8"', "application/json;"],
)
def test_the_media_type_may_be_written_in_any_case(kind):
    app = Echo()
    assert ask(app, chat(picture(uuid="x")), headers={"content-type": kind}).status_code == 400
    assert ask(app, chat(picture("file:///etc/passwd")), headers={"content-type": kind}).status_code == 400
    assert ask(app, chat(picture()), headers={"content-type": kind}).status_code == 200
    assert app.headers[0].count((b"content-type", b"application/json")) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": ""},
        {"content-encoding": "gzip"},
    ],
)
def test_another_media_type_or_a_compressed_body_is_415(headers):
    app = Echo()
    assert ask(app, chat(), headers=headers).status_code == 415
    assert app.bodies == []


def test_headers_that_steer_the_engine_and_queries_do_not_reach_it():
    app = Echo()
    headers = {"x-data-parallel-rank": "1", "x-amzn-sagemaker-adapter-identifier": "a", "x-request-id": "mine"}
    assert ask(app, chat(picture()), path="/v1/chat/completions?a=1", headers=headers).status_code == 200
    seen = dict(app.headers[0])
    assert b"x-data-parallel-rank" not in seen and b"x-amzn-sagemaker-adapter-identifier" not in seen
    assert seen[b"x-request-id"] == b"mine"


@pytest.mark.parametrize(
    "field",
    [
        "experts", "size", "images_kwargs", "router_input_ids", "expert_weights", "media_io_kwargs", "vllm_xargs",
        "chat_template", "kv_transfer_params", "ec_transfer_params", "mm_payload", "prompt_embeds", "prompt", "x" * 9999,
    ],
)  # fmt: skip
def test_a_field_that_is_not_named_is_refused_and_null_is_nothing(field):
    app = Echo()
    answer = ask(app, chat(**{field: {"a": 1}}))
    assert answer.status_code == 400 and len(answer.text) < 600
    assert ask(app, {"messages": [{"role": "user", "content": "x"}], field: None}).status_code == 200
    assert field not in app.bodies[0]


def test_a_misspelt_field_and_a_misplaced_one_are_explained():
    assert "did you mean 'temperature'" in ask(Echo(), chat(temprature=1)).json()["error"]["message"]
    assert "mm_processor_kwargs" in ask(Echo(), chat(experts=["text"])).json()["error"]["message"]


def test_what_openais_clients_send_for_their_accounts_is_left_out():
    app = Echo()
    body = chat("hello", user="u", store=False, metadata={"a": "b"}, service_tier="auto", modalities=["text"])
    assert ask(app, body).status_code == 200 and app.bodies[0] == chat({"type": "text", "text": "hello"})
    assert ask(app, chat("hello", modalities=["text", "audio"])).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/scale_elastic_ep", "/is_scaling_elastic_ep", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep",
        "/reset_prefix_cache", "/collective_rpc", "/pause", "/start_profile", "/invocations", "/inference/v1/generate",
        "/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/chat/completions/", "//v1/chat/completions",
        "/v1/audio/transcriptions", "/generative_scoring", "/server_info",
    ],
)  # fmt: skip
def test_routes_that_are_not_named_are_the_operators(path):
    app, body = Echo(), {"any": "thing"}
    for method in ("POST", "GET", "PUT", "PATCH", "DELETE"):
        assert ask(app, body, path=path, method=method).status_code == 404
        assert ask(app, body, path=path, method=method, keys=Keys(["secret"])).status_code == 401
        both, client = Keys(["secret"], "root"), {"authorization": "Bearer secret"}
        assert ask(app, body, path=path, method=method, keys=both, headers=client).status_code == 404
    assert app.bodies == []
    operator = {"authorization": "Bearer root"}
    assert ask(app, body, path=path, keys=Keys(["secret"], "root"), headers=operator).status_code == 200
    assert ask(app, body, path=path, keys=Keys([], "root"), headers=operator).status_code == 200


def test_the_wrong_method_is_405():
    for path, method in (("/v1/chat/completions", "PUT"), ("/v1/models", "POST"), ("/v1/completions", "GET")):
        assert ask(Echo(), chat(), path=path, method=method).status_code == 405


def test_pictures_in_anthropics_and_responses_form_are_judged_too():
    app, url = Echo(), encoded()
    data = url.partition(",")[2]
    base64_source = {"type": "base64", "media_type": "image/png", "data": data}
    blocks = lambda source: [{"type": "image", "source": source}, {"type": "text", "text": "a <image>"}]  # noqa: E731
    result = lambda source: [{"type": "tool_result", "tool_use_id": "t", "content": blocks(source)}]  # noqa: E731
    item = lambda url, **extra: {"type": "input_image", "image_url": url, **extra}  # noqa: E731
    anthropic = lambda content: {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}  # noqa: E731
    responses = lambda *parts: {"input": [{"role": "user", "content": list(parts)}]}  # noqa: E731
    for make in (blocks, result):
        assert ask(app, anthropic(make(base64_source)), path="/v1/messages").status_code == 200
        for bad in (
            {"type": "url", "url": "file:///etc/passwd"},
            {"type": "url", "url": "http://127.0.0.1/a.png"},
            {"type": "url"},
            {**base64_source, "data": "***"},
            {**base64_source, "data": encoded(size=(50, 50)).partition(",")[2]},
            {**base64_source, "media_type": "image/png;base64,AAAA"},
            {**base64_source, "uuid": "x"},
        ):
            assert ask(app, anthropic(make(bad)), path="/v1/messages", max_pixels=1000).status_code == 400, bad
    assert app.bodies[0]["messages"][0]["content"] == [
        {"type": "image", "source": base64_source},
        {"type": "text", "text": "a < image>"},
    ]
    assert ask(app, responses(item(url), {"type": "input_text", "text": "?"}), path="/v1/responses").status_code == 200
    for bad in (item("file:///etc/passwd"), item(None), item(url, uuid="x"), item(encoded(size=(50, 50)))):
        assert ask(app, responses(bad), path="/v1/responses", max_pixels=1000).status_code == 400, bad
    assert ask(app, {"input": "x", "previous_response_id": "resp_1"}, path="/v1/responses").status_code == 400
    assert ask(app, {"input": "x", "tools": [{"type": "mcp"}]}, path="/v1/responses").status_code == 400
    assert len(app.bodies) == 3


def test_placeholders_are_pulled_apart_in_every_disguise():
    app = Echo()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "\\u003cimage>"}'}}
    body = chat({"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"})
    body["messages"].append({"role": "assistant", "content": None, "tool_calls": [call]})
    assert ask(app, body).status_code == 200
    first, second = app.bodies[0]["messages"]
    assert "<image>" not in "".join(part["text"] for part in first["content"])
    assert json.loads(second["tool_calls"][0]["function"]["arguments"]) == {"x": "< image>"}
    named = {"type": "function", "function": {"name": "f", "parameters": {"<image>": {}}}}
    assert ask(app, chat("x", tools=[named])).status_code == 400
    assert ask(app, {"prompt": [1, 5, 2]}, path="/v1/completions", image_token_id=5).status_code == 400
    assert ask(app, {"prompt": [[1], [5]]}, path="/v1/completions", image_token_id=5).status_code == 400
    assert ask(app, {"prompt": [1, 4, 2]}, path="/v1/completions", image_token_id=5).status_code == 200


def test_several_answers_are_drawn_by_chance_where_no_temperature_is_asked_for():
    app = Echo()
    ask(app, chat("x", n=3), greedy=True)
    ask(app, chat("x", n=3, temperature=0.5), greedy=True)
    ask(app, chat("x", n=1), greedy=True)
    ask(app, chat("x", n=3), greedy=False)
    assert [body.get("temperature") for body in app.bodies] == [1.0, 0.5, None, None]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"allowed_token_ids": [7]}, "leaves nothing"),
        ({"allowed_token_ids": ["7", 7]}, "leaves nothing"),
        ({"use_beam_search": True}, "beams"),
    ],
)
def test_what_could_force_a_placeholder_is_refused(extra, says):
    app = Echo()
    refused = ask(app, chat("a", **extra), image_token_id=7)
    assert refused.status_code == 400 and says in refused.text and app.bodies == []
    for fine in ({"allowed_token_ids": [7, 8]}, {"use_beam_search": False}, {"logit_bias": {"7": 100}}):
        assert ask(app, chat("a", **fine), image_token_id=7).status_code == 200


def test_a_routed_picture_is_asked_about_at_the_chat_route_only():
    body = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": encoded()}]}]}
    answer = ask(Echo(), body, path="/v1/responses", router=LETTERS)
    assert answer.status_code == 400 and "/v1/chat/completions" in answer.json()["error"]["message"]


def test_a_clients_own_words_are_never_echoed_at_length():
    for url in ("data:image/png;base64," + "!" * 5000, "x" * 5000, "y" * 5000 + ":z", "data:" + "q" * 5000):
        answer = ask(Echo(), chat(picture(url)))
        assert answer.status_code == 400 and len(answer.text) < 400
    long = "A" * 5000
    routed = {"router": ROUTER}
    for body, settings in (
        (chat(picture(), mm_processor_kwargs={"experts": [long]}), routed),
        (chat(picture(), mm_processor_kwargs={"experts": {long: 1}}), routed),
        (chat(picture("http://" + "a" * 5000)), {"media_domains": ["pictures.example"]}),
        (chat(picture("http://user:" + long + "@pictures.example/a")), {"media_domains": ["pictures.example"]}),
        ({"messages": [{"role": long, "content": "x"}]}, {}),
        (chat({"type": long}), {}),
        (chat(**{long: 1}), {}),
    ):
        answer = ask(Echo(), body, **settings)
        assert answer.status_code == 400 and "A" * 81 not in answer.text and "a" * 81 not in answer.text, answer.text


def test_the_engines_word_to_the_first_pass_echoes_nothing_at_length():
    """The first pass asks the engine itself, past what shortens its answers."""
    app = Echo("A" * 5000, status=404)
    answer = ask(app, chat(picture(), {"type": "text", "text": "?"}), router=LETTERS)
    assert answer.status_code == 404 and "A" * 81 not in answer.text


def test_an_error_has_the_form_of_the_routes_clients():
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "nothing": 1}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = ask(Echo(), body, path=path).json()
        assert answer["type"] == "error" and "'nothing'" in answer["error"]["message"]
    assert set(ask(Echo(), body).json()) == {"error"}


def test_a_head_request_is_answered_as_a_read():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200 if scope["method"] == "GET" else 405, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for path, status in (("/health", 200), ("/v1/models", 200), ("/v1/chat/completions", 405), ("/sleep", 404)):
        assert ask(app, path=path, method="HEAD").status_code == status, path


def test_a_connection_that_cannot_be_watched_is_worked_to_the_end():
    """A failure to hear from a client was read as the client's going away."""
    sent: list[Any] = []

    async def slow(scope, receive, send):
        await receive()
        await asyncio.sleep(0.05)
        answer = json.dumps({"choices": [{"message": {"content": ""}}]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    async def go():
        body = json.dumps(chat(picture(), {"type": "text", "text": "?"})).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            raise OSError("not to be heard")

        async def keep(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": JSON}
        admission = Admission(slow, AdmissionSettings(router=LETTERS), Keys([]))
        await asyncio.wait_for(admission(scope, receive, keep), timeout=5)

    asyncio.run(go())
    assert sent[0]["status"] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b'{"temperature": NaN}',
        b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
        b"[" * 100_000,
        b'{"messages": [], "messages": []}',
        b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}',
        b'{"temperature": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        '{"messages": []}'.encode("utf-16"),
        b'\xef\xbb\xbf{"messages": []}',
        b'{"\\ud800": 1}',
        b"",
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
    assert ask(app, chat(), keys=Keys(["secret"])).status_code == 401
    assert ask(app, chat(), keys=Keys(["secret"]), headers={"authorization": "Bearer wrong"}).status_code == 401
    assert ask(app, chat(), keys=Keys(["secret"]), path="/tokenize").status_code == 401
    assert ask(app, None, keys=Keys(["secret"]), path="/metrics", method="GET").status_code == 401
    assert app.bodies == []
    assert ask(app, None, keys=Keys(["secret"]), path="/health", method="GET").status_code == 200
    assert ask(app, chat(), keys=Keys(["secret"]), headers={"authorization": "Bearer secret"}).status_code == 200


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


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engines_router_chose_is_told_once_the_pictures_were_looked_at(stream):
    """The engine is asked after the first piece of the answer came, by the file and the question."""
    from mllm.serve.http.stats import picture_key

    asked: list[Any] = []
    looked: list[bool] = []

    class Engine:
        async def collective_rpc(self, method, *, timeout, args):
            asked.append((method, args[0], bool(looked)))
            return [[[key, names] for key, names in zip(args[0], known)]]

    class App:
        def __init__(self):
            self.state = type("State", (), {"engine_client": Engine()})()

        async def __call__(self, scope, receive, send):
            while (await receive()).get("more_body"):
                pass
            kind = b"text/event-stream" if stream else b"application/json"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            looked.append(True)
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    app = App()
    admission = Admission(app, AdmissionSettings(router=ROUTER), Keys([]))

    async def go(body):
        async def with_app(scope, receive, send):
            await admission({**scope, "app": app}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=with_app), base_url="http://server") as client:
            return await client.post("/v1/chat/completions", json=body)

    other = encoded(size=(5, 5))
    body = chat(picture(), picture(other), {"type": "text", "text": " What   is it? "}, stream=stream)
    known = [["charts"], []]
    answer = asyncio.run(go(body))
    assert answer.headers["x-mllm-experts"] == "charts;none" and answer.text == "data: {}\n\n"
    files = [base64.b64decode(url.partition(",")[2]) for url in (encoded(), other)]
    assert asked == [("chosen_experts", [picture_key(file, "What is it?") for file in files], True)]
    known = [["charts"]]  # of the second the engine remembers nothing
    answer = asyncio.run(go(body))
    assert answer.status_code == 200 and "x-mllm-experts" not in answer.headers
    asyncio.run(go(chat("no picture")))
    asyncio.run(go(chat(picture(), mm_processor_kwargs={"experts": ["text"]})))
    assert len(asked) == 2, "only a choice of the engine's is asked for"


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

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": JSON}
        admission = Admission(slow, AdmissionSettings(router=LETTERS), Keys([]))
        await asyncio.wait_for(admission(scope, receive, lambda message: seen.append(message)), timeout=5)

    asyncio.run(go())
    assert seen == [{"routing_pass": True}] * 2 + ["http.disconnect"] * 2


def test_a_server_without_a_key_answers_to_this_machines_names_only():
    for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("page.example", 403)):
        assert ask(Echo(), chat("x"), headers={"host": host}, loopback=True).status_code == status, host
    assert ask(Echo(), chat("x"), headers={"host": "page.example"}).status_code == 200


def test_websockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(
        Admission(Echo(), AdmissionSettings(), Keys([]))({"type": "websocket", "path": "/v1/realtime"}, None, send)
    )
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


def test_answers_of_the_servers_own_pass_the_middleware_of_its_app_and_are_counted():
    fastapi, prometheus = pytest.importorskip("fastapi"), pytest.importorskip("prometheus_client")
    from starlette.middleware.cors import CORSMiddleware

    app = fastapi.FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["https://page.example"])
    app.add_middleware(Admission, settings=AdmissionSettings(), keys=Keys(["secret"]))
    app.add_api_route("/metrics", lambda: fastapi.Response("vllm 1\n", media_type="text/plain"))

    async def workers(*_, **__):
        return [{"semantic": {"images": 3, "seconds": 0.5}}]

    app.state.engine_client = type("Engine", (), {"collective_rpc": workers})()
    key = {"authorization": "Bearer secret"}

    async def go():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            page = {"origin": "https://page.example"}
            return [
                await client.post("/v1/chat/completions", json=chat(), headers=page),
                await client.post("/v1/chat/completions", json=chat(nothing=1), headers={**key, **page}),
                await client.get("/mllm/info", headers={**key, **page}),
                await client.get("/mllm/answer", headers=key),
                await client.get("/metrics", headers=key),
            ]

    count = lambda: prometheus.REGISTRY.get_sample_value(  # noqa: E731
        "mllm_refused_requests_total", {"reason": "key", "route": "/v1/chat/completions"}
    )
    before = count() or 0
    answers = asyncio.run(go())
    assert [answer.status_code for answer in answers] == [401, 400, 200, 404, 200]
    assert all(answer.headers["access-control-allow-origin"] == "https://page.example" for answer in answers[:3])
    assert count() == before + 1
    assert answers[4].text.startswith("vllm 1\n") and 'images_total{part="semantic",worker="0"} 3' in answers[4].text
