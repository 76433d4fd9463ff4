"""Does the page's own server come back when it dies, and is given up when it cannot live?"""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from mllm.serve import app

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
