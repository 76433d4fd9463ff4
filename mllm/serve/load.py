"""How does a server answer under load? N clients that ask about pictures for a fixed time, and what they saw."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from mllm.errors import UnavailableError
from mllm.serve.http.client import affinity

CLIENT_LIMIT = 0.7
"""Above this share of its core the measuring client may be what holds the rate back."""
_IDLE = 4
"""Seconds after which a resting connection is not used again: vLLM's server closes one after 5."""
_RETURN = 0.5
"""Seconds after which a client comes back that found no server: the failures of a dead one are to be counted, not to fill the memory."""
_POOL = 64
"""Pictures that are made; each request's own differs from all others by its bytes, so that no cache knows it."""


@dataclass(frozen=True)
class Load:
    """What every client does. sides: least and most pixels of a picture's side; pictures: of one request, at most; same: whether
    the few pictures come again and again as they are, which caches make cheap; leaving: share of requests whose client
    goes away in the middle of the answer."""

    seconds: float = 30.0
    pictures: int = 1
    sides: tuple[int, int] = (640, 640)
    max_tokens: int = 64
    same: bool = False
    leaving: float = 0.0
    seed: int = 0


@dataclass
class Outcome:
    """One request. error: empty when it was answered or left; first: seconds to the first piece of its answer; unreached: there was no
    server."""

    error: str = ""
    left: bool = False
    unreached: bool = False
    seconds: float = 0.0
    first: float | None = None
    tokens: int = 0
    pictures: int = 0


@dataclass
class Level:
    """What was measured with a number of clients; times in milliseconds, rates a second, of requests that were answered."""

    clients: int
    seconds: float
    answered: int
    left: int
    failed: int
    requests_per_second: float
    pictures_per_second: float
    tokens_per_second: float
    first_token_ms: dict[str, float]
    latency_ms: dict[str, float]
    errors: dict[str, int] = field(default_factory=dict)
    client_busy: float = 0.0
    """Share of one core that the clients themselves took: near 1 they are the limit, not the server (`CLIENT_LIMIT`)."""
    memory_mib: list[float] = field(default_factory=list)
    """Of the server's processes before and after, where it was started here."""


def run_load(
    address: str, levels: list[int], load: Load, *, api_key: str | None = None, pid: int | None = None, tell: Any = None
) -> dict[str, Any]:
    """Load a server with each number of clients in turn; returns what was measured, ready for JSON. pid: the server's process,
    for its memory; tell: called with each `Level`. Raises `UnavailableError` where nothing answers."""
    return asyncio.run(_run(address, levels, load, api_key, pid, tell))


async def _run(
    address: str, levels: list[int], load: Load, api_key: str | None, pid: int | None, tell: Any
) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE)
    timeout = aiohttp.ClientTimeout(total=600)
    address = address.rstrip("/")
    base = f"{address}/"  # aiohttp takes a path only with its slash, and puts only relative addresses behind it
    async with aiohttp.ClientSession(base, headers=headers, timeout=timeout, connector=limits) as client:
        try:
            async with client.get("v1/models") as models:
                if models.status != 200:
                    raise UnavailableError(f"{address}: status {models.status}: {(await models.text())[:200]}")
                model = (await models.json())["data"][0]["id"]
            async with client.get("version") as told:
                version = (await told.json()).get("version") if told.status == 200 else None
        except aiohttp.ClientError as error:
            raise UnavailableError(f"{address}: no server answers ({error}); start one with mllm serve") from error
        pool = make_pictures(_POOL, load.sides, load.seed)
        measured = []
        for clients in levels:
            level = await _level(client, model, pool, load, clients, pid)
            measured.append(level)
            if tell is not None:
                tell(level)
    return {
        "address": address,
        "model": model,
        "vllm": version,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load": asdict(load),
        "levels": [asdict(level) for level in measured],
    }


async def _level(
    client: aiohttp.ClientSession, model: str, pool: list[bytes], load: Load, clients: int, pid: int | None
) -> Level:
    warm = random.Random(-1 - load.seed * 1000 - clients)
    await asyncio.gather(*(_ask(client, model, pool, load, warm) for _ in range(min(4, clients))))
    before = memory_mib(pid)
    found: list[Outcome] = []
    started, worked = time.perf_counter(), time.process_time()

    async def user(number: int) -> None:
        rng = random.Random((load.seed * 1000 + clients) * 10_000 + number)
        while time.perf_counter() - started < load.seconds:
            found.append(await _ask(client, model, pool, load, rng))
            if found[-1].unreached:
                await asyncio.sleep(_RETURN)

    await asyncio.gather(*(user(number) for number in range(clients)))
    elapsed = time.perf_counter() - started
    done = [one for one in found if not one.error and not one.left]
    rate = lambda values: round(sum(values) / elapsed, 2)  # noqa: E731
    return Level(
        clients=clients,
        seconds=round(elapsed, 2),
        answered=len(done),
        left=sum(one.left for one in found),
        failed=sum(bool(one.error) for one in found),
        requests_per_second=rate(1 for _ in done),
        pictures_per_second=rate(one.pictures for one in done),
        tokens_per_second=rate(one.tokens for one in done),
        first_token_ms=_quantiles([one.first for one in done if one.first is not None]),
        latency_ms=_quantiles([one.seconds for one in done]),
        client_busy=round((time.process_time() - worked) / elapsed, 3),
        errors=dict(Counter(one.error for one in found if one.error).most_common(5)),
        memory_mib=[size for size in (before, memory_mib(pid)) if size is not None],
    )


async def _ask(client: aiohttp.ClientSession, model: str, pool: list[bytes], load: Load, rng: random.Random) -> Outcome:
    """One streamed request."""
    pictures = [picture if load.same else renamed(picture, rng) for picture in rng.choices(pool, k=load.pictures)]
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"}}
        for picture in pictures
    ]
    content.append({"type": "text", "text": f"What is in picture {rng.randrange(10**6)}?"})
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "stream": True, "ignore_eos": True,
        "max_tokens": load.max_tokens, "stream_options": {"include_usage": True},
    }  # fmt: skip
    outcome = Outcome(pictures=len(pictures))
    leaves = rng.random() < load.leaving
    kind = {"content-type": "application/json", **affinity(body)}
    data = json.dumps(body).encode()
    started = time.perf_counter()
    try:
        async with client.post("v1/chat/completions", data=data, headers=kind) as response:
            if response.status != 200:
                return Outcome(error=f"status {response.status}: {(await response.text(errors='replace'))[:160]}")
            ended = False
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    ended = ended or line.startswith(b"data: [DONE]")
                    continue
                if outcome.first is not None and b'"completion_tokens"' not in line and b'"error"' not in line:
                    continue  # one more piece of the answer: nothing to read in it, and reading takes the client's time
                event = json.loads(line[6:])
                if "error" in event:
                    return Outcome(error=f"in the stream: {str(event['error'])[:160]}")
                if event.get("choices") and outcome.first is None:
                    outcome.first = time.perf_counter() - started
                outcome.tokens = (event.get("usage") or {}).get("completion_tokens", outcome.tokens)
                if leaves and outcome.first is not None:
                    return Outcome(left=True)
            if not ended:
                return Outcome(error="the answer broke off before its end")
    except (aiohttp.ClientError, TimeoutError) as error:
        unreached = isinstance(error, aiohttp.ClientConnectorError)
        return Outcome(error=f"{type(error).__name__}: {str(error)[:160]}", unreached=unreached)
    outcome.seconds = time.perf_counter() - started
    return outcome


def make_pictures(count: int, sides: tuple[int, int], seed: int) -> list[bytes]:
    """JPEG files of coarse noise; width and height between ``sides``."""
    import numpy as np
    from PIL import Image

    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        width, height = (int(rng.integers(sides[0], sides[1] + 1)) for _ in range(2))
        coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def renamed(jpeg: bytes, rng: random.Random) -> bytes:
    """The same pixels in a file of other bytes: with a comment of its own."""
    note = rng.randbytes(8)
    return jpeg[:2] + b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note + jpeg[2:]


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


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]  # noqa: E731
    return {f"p{round(share * 100)}": round(at(share) * 1000, 1) for share in (0.5, 0.95, 0.99)}
