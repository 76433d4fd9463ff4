"""What does an operator see of a server, and how does it go away? With a small app where vLLM's would be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from mllm.serve.supervisor import ENVIRONMENT, Supervisor
from tests.helpers import ROOT, free_port

httpx = pytest.importorskip("httpx")

ENGINE = """
import asyncio, sys, uvicorn
from mllm.serve.http.admission import Admission

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            await send({"type": (await receive())["type"] + ".complete"})
    if scope["path"] == "/health":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        return await send({"type": "http.response.body", "body": b""})
    body = await receive()
    stream, seconds = b'"stream":true' in body["body"], float(dict(scope["headers"])[b"x-request-id"])
    kind = [(b"content-type", b"text/event-stream" if stream else b"application/json")]
    if stream:
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": b"data: {}\\n\\n", "more_body": True})
    await asyncio.sleep(seconds)
    if not stream:
        await send({"type": "http.response.start", "status": 200, "headers": kind})
    await send({"type": "http.response.body", "body": b"data: whole\\n\\n"})

print("noise " * 20, flush=True)
uvicorn.run(Admission(app), port=int(sys.argv[1]), log_level="info")
"""


@contextmanager
def supervised(command: list[str], port: int, **settings):
    """A supervisor and its address; it is killed when the block ends."""
    described = {
        "command": command,
        "address": f"http://127.0.0.1:{port}",
        "ready": "everything is on",
        "shutdown_timeout": 5.0,
        "verbose": False,
        **settings,
    }
    environment = {**os.environ, ENVIRONMENT: json.dumps(described), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "mllm.serve.supervisor"], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    finally:
        process.kill()


@contextmanager
def server(**settings):
    pytest.importorskip("uvicorn")
    port = free_port()
    with supervised([sys.executable, "-c", ENGINE, str(port)], port, **settings) as (process, client):
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        assert "starting" in lines[0] and "everything is on" in lines[1], lines
        yield process, client


def ask(client, seconds: float, answers: list, **extra) -> threading.Thread:
    """A request that takes some seconds, in a thread of its own."""

    def go():
        body = {"messages": [{"role": "user", "content": "x"}], **extra}
        answers.append(client.post("/v1/chat/completions", json=body, headers={"x-request-id": str(seconds)}))

    thread = threading.Thread(target=go)
    thread.start()
    return thread


def test_a_server_that_is_told_to_stop_finishes_what_it_can_and_ends_the_rest_with_an_error():
    with server(shutdown_timeout=2.5) as (process, client):
        short: list = []
        long: list = []
        threads = [ask(client, 1.5, short), ask(client, 60, long, stream=True), ask(client, 60, long)]
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        late = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert late.status_code == 503 and late.headers["retry-after"] == "5"
        assert client.get("/health").status_code == 503
        for thread in threads:
            thread.join(20)
        assert process.wait(20) == 0
    assert [answer.status_code for answer in short] == [200]
    assert sorted(answer.status_code for answer in long) == [200, 503]
    stream = next(answer.text for answer in long if answer.status_code == 200)
    assert "going away" in stream and stream.endswith("data: [DONE]\n\n")
    assert process.stderr is not None and "noise" not in process.stderr.read()


def test_a_log_that_cannot_be_written_does_not_end_the_reading(capsys):
    """The reader ended, vLLM's pipe filled up, and the server stood still."""
    supervisor = Supervisor([], "http://127.0.0.1:1", "", 1.0, verbose=False)
    supervisor.log.mkdir()
    try:
        supervisor._read(iter(["one\n", "two\n"]))
    finally:
        supervisor.log.rmdir()
        supervisor.state.folder.rmdir()
    assert list(supervisor.tail) == ["one", "two"]
    assert capsys.readouterr().err.count("goes on without a log") == 1


def test_a_death_is_explained_by_its_cause_and_not_by_all_that_follows():
    died = "import sys\nfor _ in range(5000): print('noise')\n"
    died += "print('Found ulimit of 20000. This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.')\n"
    died += "print('(APIServer pid=7) WARNING 11-29 14:30:01 [utils.py:9] This can cause `OSError: [Errno 24] Too many open files`.')\n"
    died += "print('(Worker) ERROR ValueError: no room')\n"
    died += "print('RuntimeError: Engine core initialization failed.')\nsys.exit(3)"
    with supervised([sys.executable, "-c", died], free_port()) as (process, _):
        shown = process.communicate(timeout=30)[1]
        assert process.returncode == 3
    assert "did not start (status 3): ValueError: no room" in shown and len(shown.splitlines()) == 3


def test_what_is_wrong_with_which_field_is_told():
    """Pydantic says it on the lines after the one that names the error."""
    supervisor = Supervisor([], "http://127.0.0.1:1", "", 1.0, verbose=False)
    told = "(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ParallelConfig\n"
    told += "(APIServer pid=7) tensor_parallel_size\n(APIServer pid=7)   Input should be greater than or equal to 1 [type=ge]\n"
    told += "(APIServer pid=7)     For further information visit https://errors.pydantic.dev\n"
    try:
        supervisor._read(iter(told.splitlines(keepends=True)))
    finally:
        supervisor.log.unlink()
        supervisor.state.folder.rmdir()
    wrong = "tensor_parallel_size: Input should be greater than or equal to 1"
    assert supervisor.cause == f"ValidationError: 1 validation error for ParallelConfig: {wrong}"


def test_a_flood_of_distinct_errors_fills_neither_the_disk_nor_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("mllm.serve.supervisor._MOST_LOG", 10_000)
    supervisor = Supervisor([], "http://127.0.0.1:1", "", 1.0, verbose=False)
    supervisor.is_ready.set()
    logs = [supervisor.log, supervisor.log.with_name(supervisor.log.name + ".1")]
    try:
        supervisor._read(
            iter([f"ERROR ValueError: request {number} is wrong in its own way\n" for number in range(2000)])
        )
        sizes = [path.stat().st_size for path in logs]
        assert "request 1999 " in logs[0].read_text()
    finally:
        for path in logs:
            path.unlink(missing_ok=True)
        supervisor.state.folder.rmdir()
    assert sum(sizes) < 2 * 10_000 + 200
    assert capsys.readouterr().err.count("ValueError") == 10
