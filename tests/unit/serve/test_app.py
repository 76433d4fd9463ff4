"""Does the page's own server come back when it dies, and is given up when it cannot live?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm.serve import app
from tests.helpers import ROOT

SERVER = """
import http.server, sys, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
if os.path.exists(sys.argv[2]): sys.exit(3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def wait_for(kept, text):
    deadline = time.monotonic() + 30
    while text not in kept.state():
        assert time.monotonic() < deadline, kept.state()
        time.sleep(0.1)


def test_a_server_that_dies_is_said_to_and_comes_back(monkeypatch, tmp_path):
    pytest.importorskip("httpx")
    broken = tmp_path / "broken"
    monkeypatch.setattr(
        app, "_command", lambda checkpoint, port, options: [sys.executable, "-c", SERVER, port, str(broken)]
    )
    kept = app.KeptServer("any", [])
    try:
        wait_for(kept, "server ready")
        os.kill(kept.process.pid, signal.SIGKILL)
        kept.process.wait()
        assert "ready" not in kept.state()
        deadline = time.monotonic() + 30
        while not kept.died and time.monotonic() < deadline:
            time.sleep(0.05)
        wait_for(kept, "server ready")
        assert len(kept.died) == 1
        broken.touch()
        os.kill(kept.process.pid, signal.SIGKILL)
        wait_for(kept, "too often")
        assert kept.process.poll() == 3 and len(kept.died) == app.MOST_STARTS + 1
    finally:
        kept.stop()


def test_a_page_that_is_stopped_while_it_waits_takes_its_server_along(tmp_path):
    """It left the server behind, which nobody could reach any more."""
    pytest.importorskip("httpx")
    code = (
        "import sys\nfrom mllm.serve import app, page\npage.marker = lambda checkpoint: None\n"
        "child = 'import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "app._command = lambda checkpoint, port, options: [sys.executable, '-c', child]\napp.run_page('any')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        process.terminate()
        assert process.wait(30) == 0
    deadline = time.monotonic() + 10
    while Path(f"/proc/{server}").exists() and "Z" not in Path(f"/proc/{server}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.05)


def test_a_turned_photograph_is_shown_as_the_model_sees_it(tmp_path):
    """It lay on its side, and the masks of the answer were laid over it as if it stood."""
    from PIL import Image

    from mllm.processing.images import load_image
    from mllm.serve.page import labelled
    from tests.helpers import picture

    turned = Image.Exif()
    turned[0x0112] = 6
    picture(1, size=(40, 24)).save(tmp_path / "phone.png", exif=turned)
    shown = labelled(str(tmp_path / "phone.png"), [])
    assert shown.size == (24, 40) and shown.tobytes() == load_image(tmp_path / "phone.png", where="x").tobytes()
