"""Does a server that goes away end its running requests, and only then?"""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.answering import Answer
from mllm.serve.http.errors import Refused
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

    with monkeypatch.context() as patched:
        patched.setattr(state, "_look", fails)
        assert status(Admission(Slow(0.1), AdmissionSettings(), Keys([]), state)) == 200

    async def later():
        """In one event loop: after a watch that failed the next request is ended all the same."""
        with monkeypatch.context() as patched:
            patched.setattr(state, "_look", fails)
            with pytest.raises(PermissionError):
                await state.ended()
        ServerState(tmp_path).end()
        await asyncio.wait_for(state.ended(), 5)

    asyncio.run(later())


def test_a_counter_that_is_just_being_made_counts_nothing(tmp_path):
    """An exception here would have ended the supervisor in the middle of a drain."""
    ProcessState(str(tmp_path)).enter()
    (tmp_path / "7.running").write_bytes(b"")
    assert ServerState(tmp_path).running() == 1


def ended(path: str, event: bytes) -> bytes:
    """What a client reads of a stream of which one event was sent when the server went away."""
    sent: list = []

    async def keep(message):
        sent.append(message)

    async def go():
        answer = Answer(keep, path)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await answer.send({"type": "http.response.start", "status": 200, "headers": headers})
        await answer.send({"type": "http.response.body", "body": event, "more_body": True})
        await answer.end(Refused(503, "the server is going away"))

    asyncio.run(go())
    return b"".join(message.get("body", b"") for message in sent)


def test_a_stream_that_is_ended_is_an_error_for_the_clients_of_every_route():
    """Anthropic's client passes by events without a name: to it, half an answer was a whole one."""
    openai, anthropic = pytest.importorskip("openai"), pytest.importorskip("anthropic")
    first = {
        "/v1/chat/completions": b'data: {"id":"a","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n',
        "/v1/responses": b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a","item_id":"a",'
        b'"output_index":0,"content_index":0,"sequence_number":1,"logprobs":[]}\n\n',
        "/v1/messages": b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"a"}}\n\n',
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            self.wfile.write(ended(self.path, first[self.path]))

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    asked = [{"role": "user", "content": "a"}]
    one = openai.OpenAI(api_key="k", base_url=f"{address}/v1", max_retries=0)
    two = anthropic.Anthropic(api_key="k", base_url=address, max_retries=0)
    for failed, stream in (
        (openai.APIError, lambda: one.chat.completions.create(model="m", messages=asked, stream=True)),
        (openai.APIError, lambda: one.responses.create(model="m", input="a", stream=True)),
        (anthropic.APIError, lambda: two.messages.create(model="m", messages=asked, max_tokens=9, stream=True)),
    ):
        seen = []
        with pytest.raises(failed, match="going away"):
            for event in stream():
                seen.append(event)
        assert len(seen) == 1
    server.shutdown()
