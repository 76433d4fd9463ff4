"""Does the HTTP generator keep to its concurrency, try again where that helps, and report what does not?"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from mllm.errors import ConfigError
from mllm.eval.generators.openai import OpenAIGenerator
from mllm.types import IMAGE_MARK, Request, Turn


class Server(ThreadingHTTPServer):
    """Answers with the words of the last message and the size of its pictures; refuses as told."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.under_way, self.most, self.bodies = threading.Lock(), 0, 0, []
        self.refusals: dict[str, list[int]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        with self.server.lock:
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        words = " ".join(part["text"] for part in parts if part["type"] == "text")
        time.sleep(0.01)
        with self.server.lock:
            self.server.bodies.append((body, self.headers["Authorization"], self.path))
            queue = self.server.refusals.get(words, [])
            status = queue.pop(0) if queue else 200
            self.server.under_way -= 1
        sizes = []
        for part in parts:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                sizes.append("x".join(map(str, Image.open(io.BytesIO(data)).size)))
        reply = {"choices": [{"message": {"content": f"{words} {' '.join(sizes)}".strip()}}]}
        reply["usage"] = {"prompt_tokens": 7, "completion_tokens": 3}
        data = json.dumps(reply if status != 299 else {"odd": 1}).encode()
        self.send_response(200 if status == 299 else status)
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def generator_for(server, **options):
    made = OpenAIGenerator("m", f"http://127.0.0.1:{server.server_address[1]}/v1/", api_key="secret", **options)
    made.first_pause = 0.005
    return made


def requests(count, **options):
    for k in range(count):
        turns = [Turn("system", "Be short."), Turn("user", f"{IMAGE_MARK}\nword{k}")]
        yield Request(
            f"r{k}", turns, [Image.new("RGB", (3 + k, 5))], {"max_new_tokens": 9, "do_sample": False, **options}
        )


def test_answers_every_request_once_within_the_bound(server):
    generator = generator_for(server, concurrency=3)
    answers = {response.id: response for response in generator.generate(requests(20))}
    assert {name: answer.text for name, answer in answers.items()} == {f"r{k}": f"word{k} {3 + k}x5" for k in range(20)}
    assert server.most <= 3 and answers["r0"].num_prompt_tokens == 7 and answers["r0"].num_tokens == 3
    body, key, path = server.bodies[0]
    assert body["max_tokens"] == 9 and body["temperature"] == 0.0 and body["model"] == "m" and "do_sample" not in body
    assert key == "Bearer secret" and path == "/v1/chat/completions" and body["messages"][0]["content"] == "Be short."
    assert (
        "secret" not in generator.fingerprint()
        and answers["r0"].prompt == "[system] Be short.\n[user] <image>\nword0\n"
    )
    generator.close()


def test_busy_and_broken_servers_are_asked_again_refusals_are_not(server):
    server.refusals = {"word0": [429, 503, 500], "word1": [400], "word2": [503] * 9, "word3": [299]}
    generator = generator_for(server, max_retries=3)
    answers = {response.id: response for response in generator.generate(requests(5))}
    assert answers["r0"].text == "word0 3x5" and answers["r0"].error is None and answers["r4"].error is None
    assert (
        "HTTP 400" in answers["r1"].error
        and "HTTP 503" in answers["r2"].error
        and "unreadable reply" in answers["r3"].error
    )
    tries = [body["messages"][-1]["content"][-1]["text"] for body, _, _ in server.bodies]
    assert tries.count("word0") == 4 and tries.count("word1") == 1 and tries.count("word2") == 4


def test_a_server_that_is_not_there_is_an_error_of_each_request():
    generator = OpenAIGenerator("m", "http://127.0.0.1:9/v1", max_retries=1)
    generator.first_pause = 0.001
    answers = list(generator.generate(requests(2)))
    assert len(answers) == 2 and all("ConnectError" in answer.error for answer in answers)


def test_requests_are_read_as_needed(server):
    taken = []

    def stream():
        for request in requests(50):
            taken.append(request.id)
            yield request

    answers = generator_for(server, concurrency=2).generate(stream())
    next(answers)
    assert len(taken) <= 6
    assert len(list(answers)) == 49


def test_sampling_settings_pass_and_beams_are_refused(server):
    list(generator_for(server).generate(requests(1, do_sample=True, temperature=0.7, top_p=0.9, seed=3, stop=["\n"])))
    body = server.bodies[0][0]
    assert (body["temperature"], body["top_p"], body["seed"], body["stop"]) == (0.7, 0.9, 3, ["\n"])
    with pytest.raises(ConfigError, match="num_beams"):
        list(generator_for(server).generate(requests(1, num_beams=4)))
