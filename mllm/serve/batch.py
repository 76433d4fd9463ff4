"""How does a file of requests (OpenAI's batch format) become a file of answers, however often it is interrupted?"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx

from mllm.errors import DataError, UnavailableError
from mllm.serve.http.client import affinity

ATTEMPTS = 6
"""How often a request is sent whose server is busy, going away or not there."""
_AGAIN = (429, 502, 503)
_LONGEST_PAUSE = 30.0
_TOLD_EVERY = 5.0


@dataclass
class Counts:
    """Requests of a batch. before: answered by an earlier run; failed: answered with an error, or not at all."""

    total: int = 0
    before: int = 0
    answered: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Request:
    """One line of the file."""

    name: str
    url: str
    body: dict[str, Any]


def read_requests(path: Path) -> list[Request]:
    """The requests of a file. Raises `DataError` naming the line that is none."""
    found: list[Request] = []
    names: set[str] = set()
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(data, dict) or not isinstance(data.get("custom_id"), str):
            raise DataError(f'{where}: expected {{"custom_id": …, "method": "POST", "url": …, "body": {{…}}}}')
        name, url, body = data["custom_id"], data.get("url"), data.get("body")
        if name in names:
            raise DataError(f"{where}: custom_id {name!r} stands twice in the file")
        if data.get("method", "POST") != "POST" or not isinstance(url, str) or not url.startswith("/"):
            raise DataError(f'{where}: expected method POST and a url such as "/v1/chat/completions", got {url!r}')
        if not isinstance(body, dict) or body.get("stream"):
            raise DataError(f"{where}: body must be a request's object, without stream")
        names.add(name)
        found.append(Request(name, url, body))
    if not found:
        raise DataError(f"{path}: holds no request")
    return found


def answered_names(output: Path) -> set[str]:
    """The ``custom_id`` of every answer with status 200 that a file holds; a line that was cut off counts for nothing."""
    names: set[str] = set()
    for _, line in _lines(output) if output.is_file() else ():
        try:
            answer = json.loads(line)
            if answer["response"]["status_code"] == 200:
                names.add(answer["custom_id"])
        except (ValueError, KeyError, TypeError):
            continue
    return names


def run_batch(path: Path, output: Path, address: str, *, api_key: str | None = None, concurrency: int = 32) -> Counts:
    """Send the requests of ``path`` that ``output`` holds no answer to; append every answer as it comes.

    Requests that failed stand in ``output`` with their error and are sent again by the next run. Raises `DataError` for a
    file that is no batch, `UnavailableError` where no server answers at the start, or one that did stays away.
    """
    requests = read_requests(path)
    done = answered_names(output)
    counts = Counts(total=len(requests), before=sum(request.name in done for request in requests))
    waiting = iter([request for request in requests if request.name not in done])
    output.parent.mkdir(parents=True, exist_ok=True)
    with _whole_lines(output) as file, _telling(counts):
        asyncio.run(_send_all(waiting, file, counts, address, api_key, concurrency))
    return counts


async def _send_all(
    waiting: Iterator[Request], file: TextIO, counts: Counts, address: str, api_key: str | None, concurrency: int
) -> None:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=600, limits=limits) as client:
        await _check_server(client, address)

        async def worker() -> None:
            for request in waiting:
                try:
                    answer = await _send(client, request)
                except httpx.ConnectError as error:
                    done = counts.before + counts.answered
                    raise UnavailableError(
                        f"{address}: the server went away ({error}) after {done} of {counts.total} answers; the same command goes on "
                        "from there"
                    ) from error
                good = answer["error"] is None and answer["response"]["status_code"] == 200
                counts.answered += good
                counts.failed += not good
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()

        await asyncio.gather(*(worker() for _ in range(concurrency)))


async def _check_server(client: httpx.AsyncClient, address: str) -> None:
    try:
        response = await client.get("/v1/models")
    except httpx.TransportError as error:
        raise UnavailableError(f"{address}: no server answers ({error}); start one with mllm serve") from error
    if response.status_code != 200:
        raise UnavailableError(f"{address}: status {response.status_code}: {response.text[:200]}")


async def _send(client: httpx.AsyncClient, request: Request) -> dict[str, Any]:
    """The answer's line; sent again after a pause while the server is busy or away. Raises `httpx.ConnectError` where it stays away."""
    line: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": request.name, "response": None}
    error = "no attempt"
    for attempt in range(ATTEMPTS):
        pause = min(_LONGEST_PAUSE, 2.0**attempt)
        try:
            response = await client.post(request.url, json=request.body, headers=affinity(request.body))
        except httpx.TransportError as problem:
            if isinstance(problem, httpx.ConnectError) and attempt + 1 == ATTEMPTS:
                raise
            error = f"{type(problem).__name__}: {problem}"
        else:
            if response.status_code not in _AGAIN:
                return {**line, "response": _response(response), "error": None}
            error = f"status {response.status_code}: {response.text[:200]}"
            pause = _retry_pause(response.headers, pause)
        if attempt + 1 < ATTEMPTS:
            await asyncio.sleep(pause)
    return {**line, "error": {"code": "no_answer", "message": error}}


def _response(response: httpx.Response) -> dict[str, Any]:
    try:
        body: Any = response.json()
    except ValueError:
        body = response.text
    name = response.headers.get("x-request-id", "")
    return {"status_code": response.status_code, "request_id": name, "body": body}


def _retry_pause(headers: Mapping[str, str], otherwise: float) -> float:
    seconds = headers.get("retry-after", "")
    return min(_LONGEST_PAUSE, float(seconds)) if seconds.isdigit() else otherwise


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def _whole_lines(output: Path) -> Iterator[TextIO]:
    """The file to append to, where an interrupted run's last line does not run into the next."""
    cut = False
    if output.is_file() and output.stat().st_size:
        with output.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            cut = written.read() != b"\n"
    with output.open("a", encoding="utf-8") as file:
        if cut:
            file.write("\n")
        yield file


@contextmanager
def _telling(counts: Counts) -> Iterator[None]:
    """A line on stderr every few seconds."""
    import threading

    over = threading.Event()
    started = time.monotonic()

    def tell() -> None:
        while not over.wait(_TOLD_EVERY):
            done = counts.answered + counts.failed
            rate = done / (time.monotonic() - started)
            left = counts.total - counts.before - done
            sys.stderr.write(f"{counts.before + done} of {counts.total}, {counts.failed} failed, {rate:.1f}/s")
            sys.stderr.write(f", about {left / rate:.0f} s left\n" if rate else "\n")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
