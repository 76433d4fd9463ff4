"""Does ``mllm app`` on a real engine draw masks, say that the engine died where the answer would be, and answer when it is back?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Tab, open_tab
from tests.helpers import ROOT, free_port
from tests.integration.serving import VLLM_ON_CPU
from tests.integration.test_app_page import SEEN
from tests.unit.serve.test_served_heads import ANSWERS, QUESTION, png, train_by_heart

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("vllm")]
FIELD = "#question :is(textarea, input)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's address and process, and a picture whose answer the model knows by heart."""
    pytest.importorskip("vllm")
    pytest.importorskip("gradio", reason="the page needs gradio")
    folder = tmp_path_factory.mktemp("app")
    checkpoint = Path(os.environ.get("MLLM_MARKS_CHECKPOINT") or folder / "model")
    if not (checkpoint / "model.safetensors").is_file():
        train_by_heart(checkpoint)[0].save_pretrained(checkpoint)
    picture = folder / "cups.png"
    picture.write_bytes(png(0))
    port = free_port()
    command = [sys.executable, "-m", "mllm.cli.main", "app", str(checkpoint), "--port", str(port), "--"]
    command += ["--eager", "--dtype", "float32", "--name", "cups", "--", "--block-size", "32", "--max-num-seqs", "8"]
    variables = {**os.environ, **VLLM_ON_CPU, "GRADIO_ANALYTICS_ENABLED": "False"}
    variables.pop("MLLM_API_KEY", None)
    log = folder / "app.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 900
        while (told := re.search(r"the page is at (\S+) \(server", log.read_text(errors="replace"))) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("the page did not start:\n" + log.read_text(errors="replace")[-3000:])
            time.sleep(0.5)
        yield told.group(1), process, picture, log
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def children_of(pid: int) -> dict[int, str]:
    """Every process below one, with its name."""
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                found[child] = Path(f"/proc/{child}/comm").read_text().strip()
                waiting.append(child)
    return found


def give(tab: Tab, place: str, path: Path) -> None:
    """Choose a file in a page's field."""
    found: dict[str, Any] = tab.call("Runtime.evaluate", expression=f"document.querySelector({place!r})")["result"]
    tab.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["objectId"])


def test_masks_and_an_engine_that_dies_and_comes_back(page, tmp_path):
    address, process, picture, log = page
    shots = Path(os.environ.get("MLLM_SCREENSHOTS") or tmp_path)
    said = "document.querySelector('#history').innerText"
    state = "document.querySelector('#status').innerText"
    with open_tab(tmp_path / "profile") as tab:
        tab.size(1366, 768)
        tab.go(address)
        tab.wait(f"document.querySelector('#status') && {state}.includes('server ready')", seconds=90)
        tab.wait("document.querySelector('#pictures input[type=file]')")
        time.sleep(1)  # a page that is still being built hears nothing
        give(tab, "#pictures input[type=file]", picture)
        tab.wait("document.querySelector('#shown img')")
        tab.type(FIELD, QUESTION)
        tab.wait(f"{said}.includes({ANSWERS[0].split('[')[0]!r})", seconds=120)
        tab.wait(f"{said}.includes('fake')", seconds=60)
        tab.wait("document.querySelector('#shown').innerText.includes('the cup marked')", seconds=60)
        tab.screenshot(shots / "engine_laptop.png")
        shown = "document.querySelector('#shown').innerText"
        tab.type("#phrase :is(textarea, input)", "the cup")
        tab.wait(f"{shown}.includes('the cup') && !{shown}.includes('marked')", seconds=120)
        time.sleep(1)
        tab.screenshot(shots / "engine_masks.png")
        for part in ("#shown img", "#history", FIELD):
            assert tab.run(SEEN % part), f"{part} is not in sight on a laptop"

        engines = [pid for pid, name in children_of(process.pid).items() if name.startswith("VLLM::EngineCor")]
        assert engines, children_of(process.pid)
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        tab.type(FIELD, "Still there?")
        tab.wait(f"{said}.includes('Failed')", seconds=60)
        tab.wait(f"{state}.includes('died')", seconds=60)
        tab.screenshot(shots / "engine_died.png")
        assert tab.run(f"{said}.includes('fake')"), "the earlier answer is gone"
        tab.wait(f"{state}.includes('server ready')", seconds=600)
        print(f"back after {time.monotonic() - killed:.0f} s")
        tab.run("(b => (b.querySelector('button') || b).click())(document.querySelector('#new'))")
        tab.wait(f"!{said}.includes('It is')")
        tab.type(FIELD, QUESTION)
        tab.wait(f"{said}.includes('fake')", seconds=120)
        tab.wait(f"{shown}.includes('the cup marked')", seconds=60)
        tab.screenshot(shots / "engine_back.png")

        tab.size(390, 844, phone=True)
        tab.wait("document.querySelector('#history').getBoundingClientRect().width < 391")
        tab.run("document.querySelector('#shown').scrollIntoView()")
        time.sleep(1)
        tab.screenshot(shots / "engine_phone.png")
        assert tab.run(SEEN % "#shown img") and tab.run(SEEN % "#history"), "picture and answer together on a phone"
        assert tab.run("document.documentElement.scrollWidth") <= 391, "the page is wider than a phone"
    text = log.read_text(errors="replace")
    assert "it is started again" in text or text.count("starting; vLLM") == 2, text[-1500:]
