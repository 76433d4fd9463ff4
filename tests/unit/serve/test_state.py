"""Does a server that goes away end its running requests, and only then?"""

from __future__ import annotations

import asyncio

import pytest

from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.keys import Keys
from mllm.serve.http.state import ProcessState, ServerState


class Slow:
    """An app that answers after ``seconds``."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    async def __call__(self, scope, receive, send):
        await asyncio.sleep(self.seconds)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def status(admission: Admission) -> int:
    """One request in an event loop of its own."""
    import httpx

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=admission), base_url="http://server") as client:
            return await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})

    return asyncio.run(go()).status_code


@pytest.mark.parametrize("shared", [False, True])
def test_a_second_event_loop_is_answered_as_the_first(shared, tmp_path):
    """The watch of the first loop raised in the second, which was read as "the server is going away"."""
    state = ProcessState(str(tmp_path) if shared else None)
    admission = Admission(Slow(0.1), AdmissionSettings(), Keys([]), state)
    assert [status(admission) for _ in range(3)] == [200, 200, 200]
    if shared:
        ServerState(tmp_path).end()
        assert status(Admission(Slow(30.0), AdmissionSettings(), Keys([]), state)) == 503


def test_a_watch_that_fails_ends_no_request(tmp_path, monkeypatch):
    state = ProcessState(str(tmp_path))

    async def fails():
        raise PermissionError("no look at the folder")

    monkeypatch.setattr(state, "_look", fails)
    assert status(Admission(Slow(0.1), AdmissionSettings(), Keys([]), state)) == 200
