"""Does the page of ``mllm app`` show pictures, answers, who looked and what went wrong, on a laptop and on a phone?"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.processing.mask_files import encode_rle
from mllm.serve.http.client import ServerClient
from tests.browser import open_tab
from tests.helpers import free_port

pytestmark = [pytest.mark.slow]
LIMIT = 512


class Served:
    """What a server says to the page: answers word by word, refuses what it is told to refuse, and can go away."""

    def __init__(self):
        self.asked: list[dict] = []
        self.there, self.go = True, False

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        known = {
            "/v1/models": {"data": [{"id": "two-eyes", "max_model_len": LIMIT}]},
            "/mllm/info": {"experts": ["charts", "text"], "router": "gate", "max_images": 8},
            "/health": {},
        }

        async def whole(status, data):
            await send(
                {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
            )
            await send({"type": "http.response.body", "body": json.dumps(data).encode()})

        if not self.there:
            await whole(503, {"error": {"message": "the engine is dead"}})
        elif not body:
            await whole(200, known[scope["path"]])
        else:
            self.asked.append(json.loads(body))
            question = self.asked[-1]["messages"][-1]["content"][-1]["text"]
            if "too long" in question:
                await whole(400, {"error": {"message": f"the prompt has 727 tokens, above the limit of {LIMIT}"}})
                return
            headers = [(b"content-type", b"text/event-stream"), (b"x-mllm-experts", b"charts")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for word in ("The", " green", " bar", f" ({len(self.asked)})."):
                event = {"choices": [{"delta": {"content": word}}]}
                await send(
                    {"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True}
                )
                await asyncio.sleep(0.02)
                while "lowest" in question and not self.go:
                    await asyncio.sleep(0.02)
            if "Where" in question:
                mask = np.zeros((240, 320), np.uint8)
                mask[:, :160] = 1
                heads = {
                    "mllm_masks": [{"phrase": "the left", "rle": encode_rle(mask)}],
                    "mllm_probability": {"real": 0.25},
                }
                event = json.dumps({"choices": [], **heads})
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's address, and the server behind it."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    uvicorn = pytest.importorskip("uvicorn")
    from mllm.serve.page import STYLE, build_page

    served, port = Served(), free_port()
    server = uvicorn.Server(uvicorn.Config(served, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass

    def mark(path, phrase):
        from mllm.serve.page import overlaid

        picture = Image.open(path).convert("RGB")
        mask = np.zeros((picture.height, picture.width), dtype=bool)
        mask[: picture.height // 2] = True
        return overlaid(picture, [mask])

    made = build_page(ServerClient(f"http://127.0.0.1:{port}"), mark=mark)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    made.queue().launch(
        server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True, css=STYLE
    )
    yield f"http://127.0.0.1:{made.server_port}", served
    made.close()
    server.should_exit = True
    thread.join()


SEEN = """[...document.querySelectorAll('%s')].map(e => e.getBoundingClientRect()).filter(
  r => r.width > 30 && r.height > 30 && r.top >= -1 && r.left >= -1 && r.bottom <= innerHeight + 1 && r.right <= innerWidth + 1).length"""


WHOLE_CAPTIONS = """[...document.querySelectorAll('#shown .caption-label')].every(e => e.scrollWidth <= e.clientWidth + 1
  && e.scrollHeight <= e.clientHeight + 1 && e.getBoundingClientRect().bottom <=
  document.querySelector('#shown').getBoundingClientRect().bottom + 1) && !!document.querySelector('#shown .caption-label')"""


def test_the_page_in_a_browser(page, tmp_path):
    address, served = page
    shots = Path(os.environ.get("MLLM_SCREENSHOTS") or tmp_path)
    with open_tab(tmp_path / "profile") as tab:
        tab.size(1366, 768)
        tab.go(address)
        tab.wait("document.querySelector('#status')?.innerText.includes('server ready')", seconds=60)
        tab.wait("document.querySelector('#question :is(textarea, input)')")
        row = "[...document.querySelectorAll('#examples *')].find(e => e.innerText === 'Which colour has the highest bar?')"
        tab.wait(row)
        tab.click_until(row + ".click()", "document.querySelector('#shown img')")
        tab.wait("document.querySelector('#question :is(textarea, input)').value.includes('highest')")
        tab.type("#question :is(textarea, input)", "Which colour has the highest bar?")
        tab.wait("document.querySelector('#history').innerText.includes('The green bar (1).')")
        tab.wait("document.querySelector('#shown').innerText.includes('charts')")
        tab.screenshot(shots / "laptop.png")
        for part in ("#shown img", "#history", "#question :is(textarea, input)"):
            assert tab.run(SEEN % part), f"{part} is not in sight on a laptop"
        sent = served.asked[-1]
        assert [part["type"] for part in sent["messages"][0]["content"]] == ["image_url", "text"]
        assert sent["temperature"] == 0 and "mm_processor_kwargs" not in sent  # before the settings were ever opened
        tab.wait("document.querySelector('#settings button')")
        settings = "document.querySelector('#settings button').click()"
        tab.run(settings)
        tab.wait(f"document.querySelector('#length')?.innerText.includes('this model: {LIMIT - 16} tokens')")
        assert tab.run("document.querySelector('#length input[type=range]').max") == str(LIMIT - 16)
        for part in ("#temperature", "#system textarea", "#experts"):
            assert tab.run(f"!!document.querySelector({part!r})"), part
        tab.run(settings)

        tab.type("#question :is(textarea, input)", "And the lowest?")  # a second turn carries the first
        tab.wait("document.querySelector('#history').innerText.split('The').length > 2")
        assert [message["role"] for message in served.asked[-1]["messages"]] == ["user", "assistant", "user"]
        tab.type("#question :is(textarea, input)", "And between them?")  # sent while an answer still comes: it waits
        served.go = True
        tab.wait("document.querySelector('#history').innerText.includes('(3).')")
        assert [message["role"] for message in served.asked[-1]["messages"]] == ["user", "assistant"] * 2 + ["user"]
        tab.type("#question :is(textarea, input)", "this is too long")
        tab.wait("document.querySelector('#history').innerText.includes('Refused: the prompt has 727 tokens')")
        tab.screenshot(shots / "refused.png")

        before = tab.run("document.querySelector('#shown img').src")
        tab.type("#question :is(textarea, input)", "Where is it?")
        tab.wait("document.querySelector('#shown').innerText.includes('the left marked · real 25%')")
        tab.wait(f"document.querySelector('#shown img').src !== {before!r}")
        tab.screenshot(shots / "masks.png")
        before = tab.run("document.querySelector('#shown img').src")
        tab.type("#phrase :is(textarea, input)", "the upper half")
        tab.wait(f"document.querySelector('#shown img').src !== {before!r}")
        tab.screenshot(shots / "marked.png")

        served.there = False
        tab.wait("document.querySelector('#status').innerText.includes('does not answer')")
        tab.type("#question :is(textarea, input)", "Still there?")
        tab.wait("document.querySelector('#history').innerText.includes('Failed: the engine is dead')")
        tab.screenshot(shots / "away.png")
        served.there = True
        tab.wait("document.querySelector('#status').innerText.includes('server ready')")

        asked = len(served.asked)
        tab.run("document.querySelector('#history button[aria-label*=lear], #history button[title*=lear]').click()")
        tab.wait("!document.querySelector('#history').innerText.includes('The')")
        tab.type("#question :is(textarea, input)", "From the start?")
        tab.wait(f"document.querySelector('#history').innerText.includes('({asked + 1}).')")
        assert [message["role"] for message in served.asked[-1]["messages"]] == ["user"], "what was cleared was sent"

        tab.size(390, 844, phone=True)
        tab.wait("document.querySelector('#history').getBoundingClientRect().width < 391")
        tab.run("document.querySelector('#shown').scrollIntoView()")
        tab.screenshot(shots / "phone.png")
        assert tab.run(SEEN % "#shown img") and tab.run(SEEN % "#history"), "picture and answer together on a phone"
        assert tab.run("document.documentElement.scrollWidth") <= 391, "the page is wider than a phone"
        tab.type("#question :is(textarea, input)", "Where is it?")
        tab.wait("document.querySelector('#shown').innerText.includes('the left marked · real 25%')")
        tab.run("document.querySelector('#shown').scrollIntoView()")
        tab.screenshot(shots / "phone_masks.png")
        assert tab.run(WHOLE_CAPTIONS), "a caption is cut off on a phone"
        outside = [url for url in tab.requests if url.startswith("http") and not url.startswith(address)]
        assert not outside, f"the page asks other hosts: {outside[:3]}"
