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
from mllm.eval.data.loading import load_data
from mllm.eval.generators.openai import OpenAIGenerator
from mllm.eval.predictions import read_predictions
from mllm.eval.run import evaluate
from mllm.eval.task import load_task
from mllm.types import IMAGE_MARK, Request, Turn, Video
from tests.unit.eval.test_runner import TASK, make_data


class Server(ThreadingHTTPServer):
    """Answers with the words of the last message and the size of its pictures; refuses as told."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.busy = 0, False
        self.lock, self.under_way, self.most, self.bodies = threading.Lock(), 0, 0, []
        self.refusals: dict[str, list[int]] = {}
        self.hangs: dict[str, int] = {}
        self.arrivals: dict[str, list[float]] = {}
        self.free = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.asked += 1
        self.send_error(503 if self.server.busy else 404)

    def do_POST(self):
        with self.server.lock:
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        words = " ".join(part["text"] for part in parts if part["type"] == "text")
        with self.server.lock:
            self.server.arrivals.setdefault(words, []).append(time.monotonic())
            hangs = self.server.hangs.get(words, 0)
            self.server.hangs[words] = hangs - 1
        if hangs > 0:
            self.server.free.wait(30)  # says nothing until the test is over
            return
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
    made.free.set()
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


def test_nobody_waits_for_pauses_when_no_more_answers_are_wanted(server, capsys):
    server.refusals = {f"word{k}": [503] * 9 for k in range(1, 20)}
    generator = generator_for(server, concurrency=4, max_retries=3)
    generator.first_pause = 3600.0
    answers = generator.generate(requests(20))
    assert next(answers).id == "r0"
    while len(server.bodies) < 4:  # three are told to come again, and wait
        time.sleep(0.01)
    leaving = threading.Thread(target=answers.close, daemon=True)
    leaving.start()
    leaving.join(60)
    assert not leaving.is_alive()
    told = capsys.readouterr().err
    assert told.count("HTTP 503") == 1 and "tried again, 3 times a request" in told


def test_nobody_waits_for_what_a_busy_server_would_say_of_itself(server, tmp_path):
    """A video asks for it first, in the thread of its answer: that pause went on after the last answer was wanted."""
    server.busy = True
    generator = generator_for(server, concurrency=2)
    generator.first_pause = 40.0
    film = Request("b", [Turn("user", IMAGE_MARK)], [Video(tmp_path / "film.mp4")])
    answers = generator.generate([film, Request("a", [Turn("user", "hello")])])
    assert next(answers).id == "a"
    while not server.asked:
        time.sleep(0.01)
    begun = time.monotonic()
    answers.close()
    assert time.monotonic() - begun < 15
    generator.close()


def test_a_server_that_hangs_is_asked_again_with_growing_pauses_and_not_for_ever(server):
    server.hangs = {"word1": 1, "word3": 100}
    generator = generator_for(server, concurrency=4, max_retries=2, timeout=0.25)
    generator.first_pause = 0.2
    answers = list(generator.generate(requests(6)))
    assert sorted(answer.id for answer in answers) == [f"r{k}" for k in range(6)], "each once"
    texts = {answer.id: answer.text for answer in answers}
    assert texts == {f"r{k}": f"word{k} {3 + k}x5" if k != 3 else "" for k in range(6)}
    errors = {answer.id: answer.error for answer in answers if answer.error is not None}
    assert list(errors) == ["r3"] and "ReadTimeout" in errors["r3"]
    tries = {words: len(times) for words, times in server.arrivals.items()}
    assert tries == {"word0": 1, "word1": 2, "word2": 1, "word3": 3, "word4": 1, "word5": 1}
    first, second, third = server.arrivals["word3"]
    # a pause is the first one, doubled each time, times 0.5 to 1.5; the time-out comes before it
    assert second - first >= 0.25 + 0.1 - 0.01 and third - second >= 0.25 + 0.2 - 0.01


def test_a_run_against_a_server_that_hangs_answers_every_question_once(server, tmp_path):
    folder = make_data(tmp_path / "d", 8)
    prompts = {item.id: item.turns[-1].content for item in load_data(load_task(TASK), data={TASK: folder}).items}
    server.hangs = {
        prompts["q2"].replace(IMAGE_MARK, "").strip("\n"): 1,
        prompts["q5"].replace(IMAGE_MARK, "").strip(): 9,
    }
    common = {"data": {TASK: folder}, "progress": False}
    hasty = generator_for(server, concurrency=3, max_retries=1, timeout=0.3)
    result = evaluate(hasty, [TASK], tmp_path / "o", **common)[TASK]
    assert result.num_errors == 1 and result.num_samples == 8 and "q5" in result.problems[-1]
    server.hangs.clear()
    result = evaluate(hasty, [TASK], tmp_path / "o", **common)[TASK]
    rows = read_predictions(tmp_path / "o/demo_charts.jsonl")
    assert sorted(row["id"] for row in rows) == [f"q{k}" for k in range(8)] and result.num_errors == 0
    tries = sorted(len(times) for times in server.arrivals.values())
    assert tries == [1] * 6 + [2, 3], "one hung once; one was given up after two tries and asked again by the next run"


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
