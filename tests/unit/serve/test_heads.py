"""Is a request's head bounded, for clients without a key too?"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from tests.helpers import free_port

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httptools")


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"fine"})


@pytest.fixture
def connect(monkeypatch):
    """Connections to a server whose heads may take half a second, while it knows uvicorn's reader by the name that vLLM's does."""
    from uvicorn.config import HTTP_PROTOCOLS

    from mllm.serve.http import heads
    from mllm.serve.vllm.plugin import _limit_heads

    monkeypatch.setattr(heads, "SECONDS", 0.5)
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    _limit_heads()
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off", interface="asgi3"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    @contextmanager
    def open_one():
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            yield connection

    yield open_one
    server.should_exit = True
    thread.join()


def answer_of(connection: socket.socket) -> bytes:
    """What comes until the server closes, or has answered."""
    got = b""
    while b"fine" not in got:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        got += piece
    return got


def test_a_long_head_is_refused_and_a_long_body_is_not(connect):
    with connect() as one:
        try:
            one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
            for _ in range(64):
                one.sendall(b"a" * 2**20)
        except OSError:
            pass  # closed in the middle: what is sent then is refused by the machine
        else:
            pytest.fail("64 MiB of a header were taken")
    with connect() as one:
        one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n" + b"b" * 3_000_000)
        assert b"200 OK" in answer_of(one)
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")  # the next request of the connection
        assert b"200 OK" in answer_of(one)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX: "])
def test_a_head_that_does_not_come_ends_the_connection(connect, said):
    with connect() as one:
        one.sendall(said)
        assert answer_of(one) == b""


def test_a_body_that_takes_longer_than_a_head_may_is_answered(connect):
    with connect() as one:
        one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n1")
        time.sleep(1.0)
        one.sendall(b"2")
        assert b"200 OK" in answer_of(one)
