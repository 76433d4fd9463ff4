"""How does a test look at a page in a real browser? Chromium without a window, driven by its own protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Tab:
    """One page. A wait that fails says what it waited for, and what the page showed."""

    def __init__(self, socket: Any):
        self._socket, self._numbers = socket, itertools.count(1)
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; requests of the page that are told meanwhile are kept."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=60))
            if told.get("method") == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            if told.get("id") == number:
                assert "error" not in told, (method, told["error"])
                return told["result"]

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """The window's size in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def go(self, address: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, *, seconds: float = 60) -> None:
        """Return once the expression is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.run(f"!!({script})"):
                return
            time.sleep(0.1)
        pytest.fail(f"not within {seconds} s: {script}\nthe page: {self.run('document.body.innerText')[:1500]}")

    def click_until(self, script: str, done: str) -> None:
        """Run a script that clicks, again every few seconds until something is true: a page that is still being built hears no
        click."""
        for _ in range(10):
            self.run(script)
            deadline = time.monotonic() + 4
            while time.monotonic() < deadline:
                if self.run(f"!!({done})"):
                    return
                time.sleep(0.1)
        self.wait(done, seconds=1)

    def type(self, place: str, text: str) -> None:
        """Write into the field that a selector names, and press Enter."""
        self.run(f"(() => {{const f = document.querySelector({place!r}); f.focus(); f.select()}})()")
        self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **enter)
        self.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13)

    def screenshot(self, path: Path) -> None:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def open_tab(folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own; skips the test where none is installed. folder: for the browser's profile."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here ({', '.join(NAMES)}): apt-get install chromium")
    connect = pytest.importorskip("websockets.sync.client", reason="the browser is driven through websockets").connect
    command = [
        found,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
    ]
    command += [f"--user-data-dir={folder}", "--no-first-run", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ports, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
        while not ports.is_file() or not ports.read_text().strip():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"{found} does not start here (status {process.poll()})")
            time.sleep(0.1)
        port = ports.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
            address = next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page")
        with connect(address, max_size=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(20)
