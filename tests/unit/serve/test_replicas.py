"""Does the example's proxy send a picture to the replica that knows it, and pass by one that is going away?"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections import Counter

import httpx
import pytest

from mllm.serve.http.client import AFFINITY, affinity
from tests.helpers import ROOT, free_port


def body(*pictures: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]}


def test_the_header_is_of_the_pictures_and_nothing_else():
    one = affinity(body("a"))
    assert one == affinity({**body("a"), "temperature": 1}) and len(one[AFFINITY]) == 32
    assert one != affinity(body("b")) and affinity(body("a", "b")) != affinity(body("b", "a"))
    assert affinity(body()) == {} and affinity({"input": [{"image_url": "a"}]}) == one
    film = {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}]}
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "a"}}
    assert affinity(film) == one and affinity({"messages": [{"role": "user", "content": [block]}]}) == one


class Replica:
    def __init__(self):
        uvicorn = pytest.importorskip("uvicorn")
        self.asked: list[str] = []
        self.leaving = False
        self.port = free_port()
        self.server = uvicorn.Server(
            uvicorn.Config(self.answer, port=self.port, log_level="error", lifespan="off", interface="asgi3")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def answer(self, scope, receive, send):
        headers = dict(scope["headers"])
        while (await receive()).get("more_body"):
            pass
        if not self.leaving:
            self.asked.append(headers.get(AFFINITY.encode(), b"").decode())
        await send({"type": "http.response.start", "status": 503 if self.leaving else 200, "headers": []})
        await send({"type": "http.response.body", "body": str(self.port).encode()})


@pytest.fixture
def proxy(tmp_path):
    """The proxy's address, and two replicas behind it."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed here: apt-get install nginx-light")
    replicas, port = [Replica(), Replica()], free_port()
    text = (ROOT / "examples/nginx.conf").read_text(encoding="utf-8")
    assert "listen 8000;" in text
    text = text.replace("listen 8000;", f"listen 127.0.0.1:{port};")
    for old, replica in zip((8001, 8002), replicas):
        assert f"127.0.0.1:{old}" in text
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{replica.port}")
    (tmp_path / "nginx.conf").write_text(text)
    process = subprocess.Popen([nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(f"{address}/health", timeout=2)
            break
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"nginx does not start: {process.stderr.read().decode()[-500:] if process.stderr else ''}")
            time.sleep(0.05)
    yield address, replicas
    process.terminate()
    process.wait(10)
    for replica in replicas:
        replica.server.should_exit = True
        replica.thread.join()


def test_a_picture_goes_to_one_replica_and_to_the_other_while_that_one_leaves(proxy):
    address, (first, second) = proxy
    with httpx.Client(base_url=address) as client:

        def ask(picture):
            request = body(picture)
            return client.post("/v1/chat/completions", json=request, headers=affinity(request)).text

        places = {picture: Counter(ask(picture) for _ in range(4)) for picture in map(str, range(12))}
        assert all(len(seen) == 1 for seen in places.values()), "a picture went to two replicas"
        assert len({next(iter(seen)) for seen in places.values()}) == 2, "one replica got every picture"
        assert len({client.post("/v1/chat/completions", json=body()).text for _ in range(20)}) == 2
        first.leaving = True
        assert {ask(picture) for picture in places} == {str(second.port)}
