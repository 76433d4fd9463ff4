"""Is a request's head limited however it arrives, and is nothing else?"""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.helpers import free_port

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httptools")


async def echo(scope, receive, send):
    """Answers with the number of bytes of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port():
    from mllm.serve.http.heads import LimitedHeads

    place = free_port()
    server = uvicorn.Server(uvicorn.Config(echo, port=place, http=LimitedHeads, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield place
    server.should_exit = True
    thread.join()


def head(size: int, body: int, *more: str) -> bytes:
    """A request of a head of about ``size`` bytes, for a body of ``body``."""
    lines = ["POST / HTTP/1.1", "Host: x", f"Content-Length: {body}", *more]
    lines.append("X: " + "y" * (size - sum(map(len, lines)) - 20))
    return "\r\n".join([*lines, "", ""]).encode()


def told(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What comes back until the connection ends or rests."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
        found = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while data := connection.recv(65536):
                found += data
                if found.startswith(b"HTTP/1.1 200") and found.count(b"HTTP/1.1") == len(
                    [p for p in pieces if p[:4] == b"POST"]
                ):
                    break
        except OSError:  # the server has closed with our bytes unread
            pass
        return found


@pytest.mark.parametrize("size", [70_000, 100_000, 250_000])
def test_a_head_above_the_limit_is_refused_whether_it_comes_whole_or_in_pieces(port, size):
    whole = head(size, 3) + b"abc"
    assert b" 200 " not in told(port, whole)
    pieces = [whole[k : k + 9000] for k in range(0, len(whole), 9000)]
    assert b" 200 " not in told(port, *pieces, pause=0.02)


def test_a_head_below_it_a_long_body_and_the_next_request_are_not(port):
    assert told(port, head(60_000, 3) + b"abc").endswith(b"\r\n3")
    assert told(port, head(200, 500_000) + bytes(500_000)).endswith(b"\r\n500000")
    long = head(30_000, 100_000)
    two = told(port, long + bytes(100_000), long + bytes(100_000), pause=0.2)
    assert two.count(b"HTTP/1.1 200") == 2 and two.endswith(b"\r\n100000")


def test_the_head_of_a_later_request_is_limited_too(port):
    found = told(port, head(200, 3) + b"abc", head(100_000, 3) + b"abc", pause=0.2)
    assert found.count(b"HTTP/1.1 200") == 1
