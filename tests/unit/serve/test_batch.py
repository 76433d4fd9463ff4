"""Does a batch end with one answer for every request, whatever interrupts it?"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import DataError, UnavailableError
from mllm.serve.batch import Counts, answered_names, read_requests, run_batch


@pytest.fixture
def server():
    """Answers with the question; the first time busy, for "bad" with 400, and for "late" only on the second run."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": []})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body["q"])
            if body["q"] == "last":
                threading.Thread(target=inner.shutdown).start()
                inner.socket.close()
            if body["q"] == "busy" and asked.count("busy") == 1:
                self.reply(503, {}, {"retry-after": "0"})
            elif body["q"] == "bad" or (body["q"] == "late" and asked.count("late") == 1):
                self.reply(400, {"error": {"message": "no"}})
            else:
                self.reply(200, {"text": body["q"]})

        def reply(self, status, body, headers=None):
            raw = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(raw)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    inner = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=inner.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{inner.server_port}", asked
    inner.shutdown()


def write(path, *questions):
    lines = ({"custom_id": q, "method": "POST", "url": "/v1/chat/completions", "body": {"q": q}} for q in questions)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_every_request_gets_one_answer_and_a_second_run_sends_only_what_failed(tmp_path, server):
    address, asked = server
    file, output = write(tmp_path / "in.jsonl", "one", "busy", "bad", "late", "ünï"), tmp_path / "out" / "answers.jsonl"
    counts = run_batch(file, output, address, concurrency=3)
    assert (counts.total, counts.before, counts.answered, counts.failed) == (5, 0, 3, 2)
    assert answered_names(output) == {"one", "busy", "ünï"} and asked.count("busy") == 2
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert {a["custom_id"]: a["response"]["body"] for a in answers}["ünï"] == {"text": "ünï"}
    with output.open("a") as cut:
        cut.write('{"custom_id": "one", "resp')
    del asked[:]
    asked.append("late")
    counts = run_batch(file, output, address)
    assert (counts.before, counts.answered, counts.failed) == (3, 1, 1) and sorted(asked[1:]) == ["bad", "late"]
    assert answered_names(output) == {"one", "busy", "ünï", "late"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "in.jsonl:1: not valid JSON"),
        ("[]", "custom_id"),
        ('{"custom_id": "a", "url": "v1", "body": {}}', "/v1/chat/completions"),
        ('{"custom_id": "a", "url": "/v1/x", "body": {"stream": true}}', "without stream"),
        ("\n".join(['{"custom_id": "a", "url": "/v1/x", "body": {}}'] * 2), "in.jsonl:2: custom_id 'a' stands twice"),
        ("", "holds no request"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_is_sent(tmp_path, line, says):
    file = tmp_path / "in.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=says):
        read_requests(file)


def test_of_a_servers_several_keys_a_command_sends_one(tmp_path, server, monkeypatch):
    address, _ = server
    sent = []
    monkeypatch.setenv("MLLM_API_KEY", "one-key-of-many, another-key")
    monkeypatch.setattr(
        "mllm.serve.batch.run_batch", lambda *_, api_key, **__: sent.append(api_key) or Counts(total=1, answered=1)
    )
    file = write(tmp_path / "in.jsonl", "one")
    done = CliRunner().invoke(app, ["batch", str(file), "--server", address])
    assert done.exit_code == 0 and sent == ["one-key-of-many"]


def test_a_server_that_goes_away_ends_the_run_which_goes_on_later(tmp_path, monkeypatch, server):
    """Not a request after the other, each with its pauses."""
    address, asked = server
    monkeypatch.setattr("mllm.serve.batch.ATTEMPTS", 2)
    file, output = write(tmp_path / "in.jsonl", "one", "last", "three", "four"), tmp_path / "answers.jsonl"
    with pytest.raises(UnavailableError, match=r"went away .* after 2 of 4 answers; the same command goes on"):
        run_batch(file, output, address, concurrency=1)
    assert answered_names(output) == {"one", "last"} and asked == ["one", "last"]
    assert len(output.read_text().splitlines()) == 2, "what was not asked has failed at nothing"


def test_a_server_that_is_not_there_is_told_at_once(tmp_path):
    with pytest.raises(UnavailableError, match="mllm serve"):
        run_batch(write(tmp_path / "in.jsonl", "one"), tmp_path / "out.jsonl", "http://127.0.0.1:9")
