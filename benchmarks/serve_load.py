"""How does a server hold up under load? N clients, mixed pictures and lengths, for a fixed time.

    python benchmarks/serve_load.py CHECKPOINT [--clients 32] [--seconds 60] [--rude 0.05]
    python benchmarks/serve_load.py --server http://127.0.0.1:8000 [--pid PID]

Prints requests per second, errors by kind, latency and time to first token (median, p95, p99) and the server's memory
before and after, then the same as one line of JSON. ``--rude``: share of requests whose client leaves in the middle
of the stream. With a checkpoint the server is started here (needs about a minute) and stopped at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))


def make_pictures(count: int, seed: int) -> list[str]:
    """Data URIs of noisy pictures between 32 and 1600 pixels wide; JPEG and PNG."""
    rng = np.random.default_rng(seed)
    urls = []
    for index in range(count):
        width, height = (int(2 ** rng.uniform(5, 10.6)) for _ in range(2))
        small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height))
        form = "PNG" if index % 4 == 0 else "JPEG"
        buffer = io.BytesIO()
        image.save(buffer, form)
        urls.append(f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return urls


async def one_request(
    client: httpx.AsyncClient, model: str, pictures: list[str], rng: random.Random, rude: bool
) -> dict:
    """Send one streamed request; returns its outcome and times."""
    count = rng.choice([0, 1, 1, 1, 2, 3])
    content: list[dict] = [{"type": "image_url", "image_url": {"url": rng.choice(pictures)}} for _ in range(count)]
    content.append({"type": "text", "text": f"question {rng.random()} " + "word " * rng.choice([1, 10, 60])})
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "stream": True,
        "max_tokens": rng.choice([8, 32, 64]), "ignore_eos": True,
    }  # fmt: skip
    started = time.perf_counter()
    first, pieces = None, 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return {"outcome": f"status {response.status_code}", "text": response.text[:200]}
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return {"outcome": "error in stream", "text": str(event)[:200]}
                first = first if first is not None else time.perf_counter() - started
                pieces += 1
                if rude and pieces > 2:
                    return {"outcome": "left"}
    except httpx.HTTPError as error:
        return {"outcome": type(error).__name__, "text": str(error)[:200]}
    return {"outcome": "ok", "seconds": time.perf_counter() - started, "first": first, "tokens": body["max_tokens"]}


def memory_mib(pid: int | None) -> float | None:
    """Resident memory of a process and all its children, in MiB."""
    if pid is None:
        return None
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        try:
            status = Path(f"/proc/{current}/status").read_text()
            waiting += [int(x) for x in Path(f"/proc/{current}/task/{current}/children").read_text().split()]
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
    return round(total / 1024, 1)


async def load(address: str, key: str | None, arguments: argparse.Namespace, pid: int | None) -> dict:
    """Run all clients for the given time."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    pictures = make_pictures(arguments.pictures, arguments.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=300, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        warm = random.Random(arguments.seed)
        for _ in range(4):
            await one_request(client, model, pictures, warm, False)
        before = memory_mib(pid)
        results: list[dict] = []
        started = time.perf_counter()

        async def user(number: int) -> None:
            rng = random.Random(arguments.seed * 1000 + number)
            while time.perf_counter() - started < arguments.seconds:
                results.append(await one_request(client, model, pictures, rng, rng.random() < arguments.rude))

        await asyncio.gather(*(user(number) for number in range(arguments.clients)))
        elapsed = time.perf_counter() - started
        health = (await client.get("/health")).status_code
        await asyncio.sleep(2)
        after = memory_mib(pid)
    done = [r for r in results if r["outcome"] == "ok"]
    outcomes = Counter(r["outcome"] for r in results)
    return {
        "clients": arguments.clients,
        "seconds": round(elapsed, 2),
        "requests": len(results),
        "ok": len(done),
        "errors": {k: v for k, v in outcomes.items() if k not in ("ok", "left")},
        "left_early": outcomes["left"],
        "requests_per_second": round(len(done) / elapsed, 2),
        "tokens_per_second": round(sum(r["tokens"] for r in done) / elapsed, 1),
        "latency_s": _quantiles([r["seconds"] for r in done]),
        "first_token_s": _quantiles([r["first"] for r in done if r["first"] is not None]),
        "memory_mib_before": before,
        "memory_mib_after": after,
        "health_after": health,
        "examples_of_errors": [r for r in results if r["outcome"] not in ("ok", "left")][:3],
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "p99": round(float(p99), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="serve this checkpoint here")
    parser.add_argument("--server", help="address of a running server")
    parser.add_argument("--pid", type=int, help="its process, for memory")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rude", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- options of mllm serve")
    arguments = parser.parse_args()
    process: subprocess.Popen | None = None
    address, pid = arguments.server, arguments.pid
    if address is None:
        from mllm.serve.app import start_server

        process, address = start_server(arguments.checkpoint, [o for o in arguments.options if o != "--"])
        pid = process.pid
    try:
        result = asyncio.run(load(address, os.environ.get("MLLM_API_KEY"), arguments, pid))
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)
    for name, value in result.items():
        print(f"{name:22} {value}")
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
