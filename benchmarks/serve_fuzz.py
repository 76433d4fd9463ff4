"""Does a server survive requests that nobody should send? Bounded in number and time, loopback only.

    python benchmarks/serve_fuzz.py [--requests 2000] [--seconds 300] CHECKPOINT [options of mllm serve]
    python benchmarks/serve_fuzz.py --server http://127.0.0.1:8000

What vLLM reads of mutated requests is compared with what was admitted by ``benchmarks/admission_fuzz.py`` (no engine).
Here: mutations of valid chat requests (types, sizes, depths, encodings, addresses, settings), damaged pictures, raw bytes,
broken HTTP and slow or vanishing clients. Counts answers by status; prints every 5xx. Fails when the server answers
5xx, reads the forbidden file or address, or no longer answers a valid request as it did at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

PATHS = ["/v1/chat/completions"] * 12 + [
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/v1/messages",
    "/nowhere",
    "/invocations",
    "/scale_elastic_ep",
    "/v1/messages/count_tokens",
]
DRAW = "/v1/images/generations"
DRAW_FIELDS = [
    "prompt",
    "n",
    "size",
    "cfg_scale",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "response_format",
    "model",
    "vllm_xargs",
]
JUNK: list[Any] = [
    None, True, -1, 0, 1e308, -1e308, 2**70, 10**30, "", "x", "\ud800", "\x00", "<image>" * 50, "<|im_start|>system", [],
    {}, [[]], [None], {"a": {"b": {}}}, "9" * 5000, "{{7*7}}", "%s%n", "'; DROP TABLE", "../../etc/passwd",
    "file:///etc/passwd", [1] * 500,
]  # fmt: skip
FIELDS = [
    "model",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "stream",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "logit_bias",
    "min_tokens",
    "repetition_penalty",
    "stream_options",
    "user",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "chat_template",
    "chat_template_kwargs",
    "structured_outputs",
    "prompt_logprobs",
    "bad_words",
    "allowed_token_ids",
    "priority",
    "cache_salt",
    "documents",
    "echo",
    "best_of",
    "truncate_prompt_tokens",
    "return_token_ids",
    "vllm_xargs",
    "kv_transfer_params",
    "add_generation_prompt",
    "continue_final_message",
    "stop_token_ids",
]


def picture_url(rng: random.Random, forbidden: list[str]) -> str:
    """A data URI or address, mostly wrong in some way."""
    image = Image.new("RGB", (rng.randint(1, 90), rng.randint(1, 90)), (rng.randrange(256), 9, 9))
    buffer = io.BytesIO()
    image.save(buffer, rng.choice(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]))
    data = bytearray(buffer.getvalue())
    choice = rng.randrange(12)
    if choice == 0:
        data = data[: rng.randrange(len(data))]
    elif choice == 1:
        for _ in range(rng.randint(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif choice == 2:
        data = bytearray(rng.randbytes(rng.randrange(2000)))
    elif choice == 3:  # a PNG that claims to be huge
        data = bytearray(
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00" + bytes(4)
        )
    elif choice == 4:
        return rng.choice(forbidden)
    elif choice == 5:
        return rng.choice(
            [
                "",
                "data:",
                "data:image/png",
                "data:image/png;base64",
                "data:;base64,",
                "javascript:1",
                "\x00",
                "//x",
                "data:image/png,abc",
            ]
        )
    encoded = base64.b64encode(bytes(data)).decode()
    if choice == 6:
        encoded = encoded[:-3] + rng.choice(["***", "\n\n", "=A=", "é"])
    kind = rng.choice(["image/png", "image/svg+xml", "text/html", "image/gif", "application/x-npy", "image/jpeg"])
    return f"data:{kind};base64,{encoded}"


def drawing(rng: random.Random) -> bytes:
    """A request for a drawing with one or two fields spoilt, now and then none."""
    body: dict[str, Any] = {
        "prompt": "Draw a " + "seven " * rng.randint(1, 9),
        "cfg_scale": rng.choice([1, 2]),
        "seed": 1,
    }
    for _ in range(rng.randrange(3)):
        body[rng.choice(DRAW_FIELDS)] = rng.choice(JUNK)
    return json.dumps(body).encode("utf-8", "surrogatepass")


def valid(model: str) -> dict[str, Any]:
    """A request that must always be answered."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": "hello there"}],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }


def mutated(rng: random.Random, model: str, forbidden: list[str]) -> bytes:
    """One body."""
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": picture_url(rng, forbidden)}}
        for _ in range(rng.choice([0, 1, 1, 2, 9]))
    ]
    parts.append(
        {
            "type": rng.choice(["text", "text", "image_pil", "video_url", "input_audio", "refusal", "file"]),
            "text": rng.choice(["hi", "<image>", "\ud83d"]),
        }
    )
    body: dict[str, Any] = valid(model) | {
        "messages": [{"role": rng.choice(["user", "system", "tool", "x"]), "content": parts}]
    }
    for _ in range(rng.randrange(4)):
        body[rng.choice(FIELDS)] = rng.choice(JUNK)
    if rng.random() < 0.2:
        body["max_tokens"] = rng.choice([1, 5, 10**9, 0])
    if rng.random() < 0.1:
        target = rng.choice(parts)
        if isinstance(target, dict):
            target[rng.choice(list(target))] = rng.choice(JUNK)
    if rng.random() < 0.1:
        body["mm_processor_kwargs"] = rng.choice(
            [{"experts": rng.choice(JUNK)}, {"device": "cuda"}, {"images_kwargs": {"experts": ["x"]}}]
        )
    raw = json.dumps(body).encode()
    if rng.random() < 0.15:
        spot = rng.randrange(len(raw))
        raw = raw[:spot] + rng.randbytes(rng.randrange(1, 9)) + raw[spot + rng.randrange(9) :]
    if rng.random() < 0.03:
        raw = b"[" * rng.randrange(100_000)
    return raw


async def broken_http(address: str, rng: random.Random) -> str:
    """A connection that does not keep to the protocol, or leaves."""
    parts = urlsplit(address)
    reader, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, parts.port), 10)
    try:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        lines = [
            rng.randbytes(200),
            head + b"Content-Length: 999999\r\n\r\n{",
            head + b"Content-Length: -5\r\n\r\n{}",
            head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
            head + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
            b"PUT /v1/models HTTP/9.9\r\n\r\n",
        ]
        writer.write(rng.choice(lines))
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(200), 0.5)
        return answer[9:12].decode("latin-1") or "closed"
    except (TimeoutError, OSError):
        return "left"
    finally:
        writer.close()


def _failure(number: int, path: str, body: bytes, answer: str) -> dict:
    shown = body if len(body) < 900 else body[:450] + b" ... " + body[-450:]
    return {"number": number, "path": path, "answer": answer, "body": shown.decode("latin-1")}


async def fuzz(address: str, key: str | None, arguments: argparse.Namespace, forbidden: list[str]) -> dict:
    """All requests, eight at a time."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    counts: Counter[str] = Counter()
    failures: list[dict] = []
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=60) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        reference = (await client.post("/v1/chat/completions", json=valid(model))).json()["choices"][0]["message"][
            "content"
        ]
        numbers = iter(range(arguments.requests))

        async def worker() -> None:
            for number in numbers:
                if time.perf_counter() - started > arguments.seconds:
                    return
                rng = random.Random(arguments.seed * 10**7 + number)
                if rng.random() < 0.05:
                    counts[f"raw {await broken_http(address, rng)}"] += 1
                    continue
                body, path = mutated(rng, model, forbidden), rng.choice([*PATHS, DRAW, DRAW])
                if path == DRAW and rng.random() < 0.8:
                    body = drawing(rng)
                kind = rng.choice(["application/json"] * 9 + ["text/plain", "multipart/form-data; boundary=x"])
                sent = {"content": body, "headers": {"content-type": kind, **headers}}
                try:
                    try:
                        response = await client.post(path, **sent)
                    except (httpx.ReadError, httpx.RemoteProtocolError):  # an idle connection that the server gave up
                        async with httpx.AsyncClient(base_url=address, timeout=60) as fresh:
                            response = await fresh.post(path, **sent)
                        counts["on a second connection"] += 1
                    counts[str(response.status_code)] += 1
                    if response.status_code >= 500:
                        failures.append(_failure(number, path, body, f"{response.status_code} {response.text[:300]}"))
                except httpx.HTTPError as error:
                    counts[type(error).__name__] += 1
                    failures.append(_failure(number, path, body, repr(error)))

        await asyncio.gather(*(worker() for _ in range(8)))
        final = await client.post("/v1/chat/completions", json=valid(model))
        same = final.status_code == 200 and final.json()["choices"][0]["message"]["content"] == reference
    return {
        "sent": sum(counts.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "answers": dict(counts),
        "failures": failures,
        "still_answers": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--server")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- options of mllm serve")
    arguments = parser.parse_args()
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    inner = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=inner.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret.png"
        Image.new("RGB", (9, 9)).save(secret)
        os.utime(secret, (1, 1))
        port = inner.server_port
        forbidden = [
            f"file://{secret}",
            str(secret),
            f"http://127.0.0.1:{port}/a",
            f"http://localhost:{port}/b",
            f"http://[::1]:{port}/c",
        ]
        address, process = arguments.server, None
        if address is None:
            from mllm.serve.app import start_server

            process, address = start_server(arguments.checkpoint, [o for o in arguments.options if o != "--"])
        try:
            result = asyncio.run(fuzz(address, os.environ.get("MLLM_API_KEY"), arguments, forbidden))
        finally:
            if process is not None:
                process.terminate()
                process.wait(60)
            inner.shutdown()
    result["forbidden_addresses_fetched"] = asked
    for failure in result["failures"][:20]:
        print("FAILURE", json.dumps(failure))
    print({key: value for key, value in result.items() if key != "failures"})
    print("RESULT " + json.dumps(result))
    if result["failures"] or asked or not result["still_answers"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
