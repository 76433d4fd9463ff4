"""Does vLLM get what the admission saw? Mutations of accepted requests, in process, without an engine.

    python benchmarks/admission_fuzz.py [--requests 20000] [--seed 0]

Every request goes through `mllm.serve.http.admission.Admission` into vLLM's own FastAPI routes, request classes and
content parser; only the handlers behind them are replaced, by ones that keep what they were given. Mutated are headers,
media types, encodings, duplicate keys, escapes, nesting, types, forms of parts, methods, paths, and how the body is cut.
Reported is each request that was let through and of which vLLM read something else than was admitted: a field, a
picture, a cache name, a placeholder. Fails when there is one, or when hardly anything was let through.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import io
import json
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.keys import Keys

TOKEN = "<image>"
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
PATHS = [CHAT] * 8 + [MESSAGES, MESSAGES, RESPONSES, RESPONSES, "/v1/completions", "/tokenize"]
ROUTER = {"type": "constant", "experts": ["text", "charts"]}
JUNK: list[Any] = [
    None, True, 0, -1, 1.5, 2**70, "", "x", TOKEN, "\ud800", [], {}, [None], [[]], {"a": {"b": {}}}, ["x"],
    {"url": None}, "file:///etc/passwd", "data:,", {"type": "image_url"},
]  # fmt: skip
POISON: dict[str, list[Any]] = {
    "uuid": ["0" * 64, "victim", 7],
    "type": [None, "image_url", "image_embeds", "input_image", "IMAGE_URL", "text"],
    "image_url": [None, {"url": None}, {"url": "file:///etc/passwd"}, "http://127.0.0.1/a"],
    "image_embeds": [None, "AAAA"],
    "image_pil": [None],
    "video_url": [{"url": "file:///etc/passwd"}],
    "mm_processor_kwargs": [{"size": 1}, {"experts": ["text"], "device": "cuda"}, {"images_kwargs": {}}],
    "media_io_kwargs": [{"image": {"mode": "L"}}],
    "vllm_xargs": [{"mllm_drawing": "x"}],
    "kv_transfer_params": [{"remote_host": "x"}],
    "chat_template": ["{{ messages }}"],
    "cache_salt": ["victim"],
    "prompt_embeds": ["AAAA"],
    "source": [{"type": "url", "url": "file:///etc/passwd"}],
    "experts": [["text"]],
    "content": [TOKEN, None, [{"text": TOKEN}]],
}
KINDS = [b"application/JSON", b"Application/Json; charset=utf-8", b"text/json", b"text/plain", b"", b"application/json;",
         b"application/json; charset=utf-16", b"application/json ; x=1", b"application/vnd.api+json", b"multipart/form-data",
         b"application/x-www-form-urlencoded", b"application/json, text/plain"]  # fmt: skip
ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"]
EXTRA = [(b"content-encoding", b"gzip"), (b"content-encoding", b"identity"), (b"transfer-encoding", b"chunked"),
         (b"x-data-parallel-rank", b"1"), (b"x-http-method-override", b"GET"), (b"content-length", b"3"),
         (b"x-amzn-sagemaker-adapter-identifier", b"a"), (b"x-request-id", b"\xff" * 9), (b"expect", b"100-continue")]  # fmt: skip


class Pairs(list):
    """A JSON object as pairs, so that a key can stand twice."""


def picture(rng: random.Random) -> str:
    """A data URI of a small picture."""
    buffer = io.BytesIO()
    kind = rng.choice(["PNG", "JPEG", "GIF"])
    Image.new("RGB", (rng.randint(1, 9), rng.randint(1, 9)), (rng.randrange(256), 1, 2)).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def accepted(rng: random.Random, path: str) -> dict[str, Any]:
    """A request that is let through, in one of the forms that clients use."""
    text = rng.choice(["what is it?", "ünï 漢字", f"a {TOKEN} b", "<ima", "ge>"])
    if path == "/v1/completions":
        return {"prompt": rng.choice([text, [text, "b"], [1, 2, 3]]), "max_tokens": 1}
    count = rng.choice([0, 1, 1, 2])
    urls = [picture(rng) for _ in range(count)]
    if path == MESSAGES:
        blocks: list[Any] = [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}}
            for url in urls
        ]
        if rng.random() < 0.3:
            blocks = [{"type": "tool_result", "tool_use_id": "t", "content": [*blocks, {"type": "text", "text": text}]}]
        turns: list[Any] = [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]
        if rng.random() < 0.3:
            turns.insert(
                0,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": text}}]},
            )
        return {"model": "m", "max_tokens": 1, "messages": turns}
    if path == RESPONSES:
        parts: list[Any] = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
        return {"input": [{"role": "user", "content": [*parts, {"type": "input_text", "text": text}]}]}
    parts = [
        rng.choice(
            [
                {"type": "image_url", "image_url": {"url": url}},
                {"image_url": {"url": url}},
                {"image_url": url},
                {"type": "input_image", "image_url": url},
            ]
        )
        for url in urls
    ]
    parts += [rng.choice([{"type": "text", "text": text}, {"text": text}, text]) for _ in range(rng.randint(1, 2))]
    rng.shuffle(parts)
    messages: list[Any] = [{"role": "user", "content": parts}]
    if rng.random() < 0.3:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": text})}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    body: dict[str, Any] = {"model": "m", "messages": messages}
    if path == CHAT:
        body |= rng.choice(
            [{}, {"temperature": 0.5, "seed": 3}, {"max_tokens": 1, "stream": False}, {"logprobs": True}]
        )
        if urls and rng.random() < 0.3:
            body["mm_processor_kwargs"] = {"experts": rng.choice([["text"], {"text": 2}, "none"])}
    return body


def as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs([name, as_pairs(item)] for name, item in value.items())
    return [as_pairs(item) for item in value] if isinstance(value, list) else value


def nodes(value: Any, kind: type) -> list[Any]:
    """All containers of a kind in a tree of pairs."""
    found = [value] if type(value) is kind else []
    for item in value if isinstance(value, list) else []:
        found += nodes(item[1] if type(value) is Pairs else item, kind)
    return found


def mutate(rng: random.Random, tree: Pairs) -> None:
    """One change of the body's structure."""
    objects = nodes(tree, Pairs)
    spot = rng.choice(objects)
    pair = rng.choice(spot) if spot else None
    choice = rng.randrange(9)
    if choice <= 1:
        name = rng.choice(list(POISON))
        spot.insert(rng.randint(0, len(spot)), [name, as_pairs(copy.deepcopy(rng.choice(POISON[name])))])
    elif choice == 2 and pair:  # a key twice, with another value
        spot.insert(rng.randint(0, len(spot)), [pair[0], as_pairs(copy.deepcopy(rng.choice(JUNK)))])
    elif choice == 3 and pair:
        spot.remove(pair)
    elif choice == 4 and pair:
        pair[1] = as_pairs(copy.deepcopy(rng.choice(JUNK)))
    elif choice == 5 and pair:
        pair[0] = rng.choice([str(pair[0]).upper(), f"{pair[0]} ", f"{pair[0]}\x00", TOKEN, ""])
    elif choice == 6 and pair:
        pair[1] = rng.choice([[pair[1]], Pairs([[pair[0], pair[1]]]), json.dumps(str(pair[1]))])
    elif choice == 7:
        inside = [item for item in nodes(tree, list) if item]
        if inside:
            items = rng.choice(inside)
            items.insert(rng.randint(0, len(items)), copy.deepcopy(rng.choice([*items, *map(as_pairs, JUNK)])))
    elif pair:  # a part of the request somewhere else
        rng.choice(objects).append(copy.deepcopy(pair))


def text_of(rng: random.Random, value: Any, escape: float) -> str:
    """JSON in one of its many writings."""
    space = rng.choice(["", "", "", " ", "\n\t"])
    if type(value) is Pairs:
        items = (f"{text_of(rng, k, escape)}{space}:{text_of(rng, v, escape)}" for k, v in value)
        return "{" + space + ("," + space).join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(text_of(rng, item, escape) for item in value) + space + "]"
    if isinstance(value, str):
        if len(value) < 200 and rng.random() < escape:
            return '"' + "".join(f"\\u{ord(c):04X}" if ord(c) < 2**16 else c for c in value) + '"'
        return json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.1:
        return rng.choice([f"{value}.0", f"{value}e0", f"0{value}", f"+{value}", "NaN", "1e999"])
    return json.dumps(value)


def request(rng: random.Random) -> tuple[dict[str, Any], list[bytes]]:
    """Scope and body chunks of one request."""
    path, method, headers = rng.choice(PATHS), "POST", [(b"host", b"x")]
    tree = as_pairs(accepted(rng, path))
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        mutate(rng, tree)
    text = text_of(rng, tree, rng.choice([0.0, 0.0, 0.3]))
    if rng.random() < 0.03:
        text += rng.choice([" ", "{}", text, "\x00", "//x"])
    encoding = rng.choice(ENCODINGS) if rng.random() < 0.06 else "utf-8"
    raw = text.encode(encoding, "surrogatepass" if encoding == "utf-8" else "replace")
    if rng.random() < 0.02:
        spot = rng.randrange(len(raw))
        raw = raw[:spot] + rng.randbytes(rng.randint(1, 4)) + raw[spot + rng.randrange(4) :]
    kinds = [rng.choice(KINDS) if rng.random() < 0.25 else b"application/json"]
    if rng.random() < 0.03:
        kinds += [rng.choice(KINDS)]
    headers += [(b"content-type", kind) for kind in kinds if rng.random() < 0.98]
    headers += [rng.choice(EXTRA) for _ in range(rng.choice([0, 0, 0, 1]))]
    rng.shuffle(headers)
    query = rng.choice([b"", b"", b"", b"a=1", b"uuid=x&model=y"])
    if rng.random() < 0.04:
        path = rng.choice(
            [path + "/", path.upper(), "/" + path, path + "/batch", path + "/../tokenize", "/invocations"]
        )
    if rng.random() < 0.02:
        method = rng.choice(["PUT", "GET", "post", "PATCH", "DELETE"])
    cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
    chunks = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)])]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": query, "headers": headers,
        "server": ("x", 80), "client": ("y", 1),
    }  # fmt: skip
    return scope, chunks


class Engine:
    """vLLM's routes with handlers that keep the request they were given. Raises `ImportError` for a vLLM whose inside is
    another one."""

    def __init__(self) -> None:
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.openai.responses.utils import construct_input_messages
        from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
        from vllm.renderers import chat_utils
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        logging.disable(logging.ERROR)
        self.app: Any = build_app(
            make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-offline-docs"]), ("generate",)
        )
        self.seen: list[tuple[str, Any]] = []
        self.raw: bytes | None = None
        answer = ErrorResponse(error=ErrorInfo(message="kept", type="kept", code=418))

        class Handler:
            def __getattr__(_, name: str) -> Any:
                async def keep(request: Any, raw_request: Any) -> Any:
                    self.seen.append((raw_request.url.path, request))
                    return answer

                return keep

        for name in ("chat", "completion", "responses"):
            setattr(self.app.state, f"openai_serving_{name}", Handler())
        self.app.state.anthropic_serving_messages = self.app.state.serving_tokenization = Handler()
        self._anthropic, self._responses = AnthropicServingMessages.to_chat_completion_request, construct_input_messages
        self._parse, self._parser = chat_utils._parse_chat_message_content, chat_utils.BaseMultiModalContentParser

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, messages = bytearray(), []
        while True:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.raw = bytes(body)

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)

    def read(self, path: str, request: Any) -> tuple[list[tuple[str, Any, Any]], list[str]]:
        """What vLLM makes of a conversation: (kind, address, cache name) of every piece of media, and all texts."""
        if path == MESSAGES:
            request = self._anthropic(request)
        messages = getattr(request, "messages", None)
        if path == RESPONSES:
            messages = self._responses(request_instructions=request.instructions, request_input=request.input)
        media: list[tuple[str, Any, Any]] = []

        def record(name: str) -> Any:
            return lambda _, content=None, uuid=None: media.append((name.removeprefix("parse_"), content, uuid))

        names = [name for name in dir(self._parser) if name.startswith("parse_")]
        recorder = type(
            "Recorder", (self._parser,), {"model_config": _Plain(), **{name: record(name) for name in names}}
        )

        class Tracker:
            def create_parser(self, **_: Any) -> Any:
                return recorder()

        texts: list[str] = []
        for message in messages or []:
            for parsed in self._parse(message, Tracker(), "openai", False):
                content = parsed.get("content")
                parts = content if isinstance(content, list) else [{"text": content}]
                texts.append("".join(part.get("text") or "\n" for part in parts if isinstance(part, dict)))
                for call in parsed.get("tool_calls") or []:
                    arguments = call["function"]["arguments"]
                    texts.append(json.dumps(json.loads(arguments) if isinstance(arguments, str) else arguments))
        return media, texts


class _Plain:
    enable_prompt_embeds = False


class Watched(Admission):
    """Keeps what was admitted."""

    admitted: Any = None

    async def _admit(self, path: str, data: dict[str, Any], owner: str) -> tuple[dict[str, Any], list[bytes]]:
        made, files = await super()._admit(path, data, owner)
        self.admitted = made
        return made, files


def differences(engine: Engine, admitted: dict[str, Any]) -> list[str]:
    """What vLLM read in the one request it was given and the admission had not seen, or should not have let through."""
    from pydantic_core import from_json

    found = []
    if engine.raw is None or json.loads(engine.raw) != admitted or from_json(engine.raw) != admitted:
        found.append("the body")
    for path, request in engine.seen:
        given = request.model_dump(mode="python", warnings=False)
        for name in ("media_io_kwargs", "chat_template", "vllm_xargs", "kv_transfer_params", "prompt_embeds", "uuid"):
            if given.get(name) is not None:
                found.append(name)
        for name in ("temperature", "seed", "max_tokens", "n", "stream", "model", "mm_processor_kwargs", "cache_salt"):
            if admitted.get(name) is not None and name in given and given[name] != admitted[name]:
                found.append(f"{name} differs")
        if set(given.get("mm_processor_kwargs") or {}) - {"experts"}:
            found.append("mm_processor_kwargs")
        if given.get("cache_salt") is not None and len(given["cache_salt"]) != 64:
            found.append("cache_salt is the client's")
        media, texts = engine.read(path, request)
        expected = _pictures(path, admitted)
        named = path != MESSAGES and path != RESPONSES
        if [(kind, url) for kind, url, _ in media] != [("image", url) for url, _ in expected]:
            found.append(f"pictures {[(kind, str(url)[:40]) for kind, url, _ in media]}")
        elif any(key not in ((own,) if named else (own, None)) for (_, _, key), (_, own) in zip(media, expected)):
            found.append("cache names")
        if any(TOKEN in text for text in texts):
            found.append("a placeholder")
    return found


def _pictures(path: str, admitted: dict[str, Any]) -> list[tuple[str, str]]:
    """Address and cache name of every picture in the admitted body, in the order of the conversation."""
    found: list[tuple[str, str]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("type") == "tool_use":
                return  # a tool's arguments are nobody's content, whatever they look like
            if value.get("type") == "image_url":
                found.append((value["image_url"]["url"], value["uuid"]))
            elif value.get("type") == "input_image":
                found.append((value["image_url"], value["uuid"]))
            elif value.get("type") == "image":
                source = value["source"]
                found.append((f"data:{source['media_type']};base64,{source['data']}", ""))
            else:
                for item in value.values():
                    walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(admitted.get("messages") or admitted.get("input"))
    return found


async def fuzz(
    requests: int, seed: int = 0, kind: type[Watched] = Watched, engine: Engine | None = None, first: int = 0
) -> dict[str, Any]:
    """Counts of answers, requests that vLLM read, and every difference with its number. first: the number of the first request."""
    engine = engine or Engine()
    settings = AdmissionSettings(router=ROUTER, image_token=TOKEN, image_token_id=9, salt="fuzz")
    admission = kind(engine, settings, Keys([]))
    answers: Counter[str] = Counter()
    differing: list[tuple[int, list[str]]] = []
    read = 0
    for number in range(first, first + requests):
        scope, chunks = request(random.Random(seed * 10**7 + number))
        engine.seen.clear()
        engine.raw = admission.admitted = None
        messages = [{"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)} for i, c in enumerate(chunks)]
        status: list[int] = []

        async def receive(messages: list[Any] = messages) -> Any:
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()

        async def send(message: Any, status: list[int] = status) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])

        try:
            await admission(scope, receive, send)
        except Exception as error:  # what a server would answer with 500
            differing.append((number, [f"{type(error).__name__}: {str(error)[:200]}"]))
            continue
        answers[str(status[0])] += 1
        if engine.raw is None:
            continue
        read += bool(engine.seen)
        try:
            found = differences(engine, admission.admitted or {})
        except Exception as error:  # a form that the admission should have rewritten
            found = [f"a form of its own: {type(error).__name__} {str(error)[:100]}"]
        if found:
            differing.append((number, found))
    return {"sent": requests, "read_by_vllm": read, "answers": dict(answers), "differing": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first request, to look at one again")
    arguments = parser.parse_args()
    started = time.perf_counter()
    result = asyncio.run(fuzz(arguments.requests, arguments.seed, first=arguments.first))
    result["seconds"] = round(time.perf_counter() - started, 1)
    for number, found in result["differing"][:20]:
        scope, chunks = request(random.Random(arguments.seed * 10**7 + number))
        print("DIFFERS", number, found, scope["method"], scope["path"], b"".join(chunks)[:600])
    result["differing"] = len(result["differing"])
    print("RESULT " + json.dumps(result))
    if result["differing"] or result["read_by_vllm"] < arguments.requests // 5:
        sys.exit(1)


if __name__ == "__main__":
    main()
