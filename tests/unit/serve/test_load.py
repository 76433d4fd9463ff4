"""Does the load test count what really happened?"""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.serve.load import Load, make_pictures, renamed, run_load
from tests.helpers import free_port

BREAKS_OFF = 99
"""Tokens of a request whose answer stops after the first, without a word: as where a proxy ends the stream of a server that died."""


@pytest.fixture
def stop():
    """Ends the server of this test."""
    running: list = []

    def end():
        for uvicorn_server, thread in running:
            uvicorn_server.should_exit = True
            thread.join()

    end.running = running
    yield end
    end()


@pytest.fixture
def server(stop):
    """A server that streams ``max_tokens`` pieces, the first after 50 ms; every fifth request is refused."""
    uvicorn = pytest.importorskip("uvicorn")
    seen: list[dict] = []

    async def answer(scope, receive, send):
        if scope["type"] != "http":
            return
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)

        async def start(status, kind):
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})

        if not body:
            await start(200, b"application/json")
            answers = {"/v1/models": {"data": [{"id": "m"}]}, "/version": {"version": "0.0"}}
            await send({"type": "http.response.body", "body": json.dumps(answers[scope["path"]]).encode()})
            return
        seen.append(json.loads(body))
        if len(seen) % 5 == 0:
            await start(503, b"application/json")
            await send({"type": "http.response.body", "body": b"busy"})
            return
        await start(200, b"text/event-stream")
        if seen[-1]["max_tokens"] == BREAKS_OFF:
            await send({"type": "http.response.body", "body": b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'})
            return
        await asyncio.sleep(0.05)
        for _ in range(seen[-1]["max_tokens"]):
            piece = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        usage = {"choices": [], "usage": {"completion_tokens": seen[-1]["max_tokens"]}}
        await send({"type": "http.response.body", "body": f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode()})

    port = free_port()
    running = uvicorn.Server(uvicorn.Config(answer, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        pass
    stop.running.append((running, thread))
    yield f"http://127.0.0.1:{port}", seen


def test_rates_times_and_failures_are_those_of_the_server(server):
    address, seen = server
    load = Load(seconds=0.6, pictures=2, sides=(16, 40), max_tokens=3)
    measured = run_load(address, [1, 4], load)
    assert [level["clients"] for level in measured["levels"]] == [1, 4]
    for level in measured["levels"]:
        first = level["first_token_ms"]
        assert 50 <= first["p50"] <= first["p95"] <= level["latency_ms"]["p95"] + 1 and first["p50"] < 2000
        assert level["requests_per_second"] == pytest.approx(level["answered"] / level["seconds"], rel=0.02)
        assert level["pictures_per_second"] == pytest.approx(2 * level["answered"] / level["seconds"], rel=0.02)
        assert level["tokens_per_second"] == pytest.approx(3 * level["answered"] / level["seconds"], rel=0.02)
        assert 0 < level["client_busy"] < 3
        assert sum(level["errors"].values()) == level["failed"] and "503" in str(level["errors"])
    assert sum(level["answered"] + level["failed"] for level in measured["levels"]) == len(seen) - 1 - 4  # the warm-up
    addresses = [part["image_url"]["url"] for body in seen for part in body["messages"][0]["content"][:2]]
    assert len(set(addresses)) == len(addresses), "a picture came twice"


def test_an_answer_that_breaks_off_is_none(server):
    address, _ = server
    level = run_load(address, [2], Load(seconds=0.2, pictures=0, max_tokens=BREAKS_OFF))["levels"][0]
    assert level["answered"] == 0 and any("broke off before its end" in error for error in level["errors"])


def test_clients_do_not_knock_at_a_dead_server_without_a_pause(server, stop):
    address, _ = server
    load = Load(seconds=1.2, pictures=0, max_tokens=1)
    alive, dead = run_load(f"{address}/", [1, 2], load, tell=lambda level: level.clients == 1 and stop())["levels"]
    assert alive["answered"] > 0 and dead["answered"] == 0
    assert 2 <= dead["failed"] <= 2 * 3, "each of two clients comes back every half second"


def test_the_command_shows_a_table_writes_json_and_fails_with_the_requests(server, tmp_path):
    address, _ = server
    file = tmp_path / "load.json"
    command = [
        "bench",
        "serve",
        "--server",
        f"{address}/v1/",
        "--clients",
        "2",
        "--seconds",
        "0.5",
        "--sides",
        "16",
        "-o",
        str(file),
    ]
    done = CliRunner().invoke(app, [*command, "--same-pictures", "--max-tokens", "2"])
    assert done.exit_code == 1 and "503" in done.output and "first token" in done.output
    assert json.loads(file.read_text())["load"]["same"] is True


def test_a_renamed_picture_has_other_bytes_and_the_same_pixels():
    picture = make_pictures(1, (20, 30), 0)[0]
    other = renamed(picture, random.Random(1))
    assert other != picture
    one, two = (np.asarray(Image.open(io.BytesIO(content))) for content in (picture, other))
    assert (one == two).all()
