"""What does an operator see of a server, and how does it end? A small process that starts vLLM's, and outlives it.

It shows one line when the server is ready and why it died when it does; everything that vLLM says goes to a log file. On
SIGTERM or SIGINT the server is not ready at once, running requests finish or are told, and the exit code is 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from mllm.serve.http.state import FOLDER, ServerState

ENVIRONMENT = "MLLM_SUPERVISOR"
"""Environment variable with `Supervisor`'s arguments as JSON."""
_ERROR = re.compile(r"\b([A-Z]\w*(?:Error|Exception)): (.{1,500})")
_RAISED = re.compile(
    r"^(?:\([^)]*\) )*(?:ERROR (?:[\d :-]+ \[[^\]]*\] )?)?[a-z_.]*([A-Z]\w*(?:Error|Exception)): (.{1,500})"
)
"""The last line of a traceback; an error that is named within a sentence may be one that is only feared."""
_QUIETER = re.compile(r"\b(?:WARNING|INFO|DEBUG) \d\d-\d\d \d\d:\d\d")  # a warning may name an error that it only fears
_FOLLOWS = re.compile(r"Engine core initialization failed|See stack trace above|EngineDeadError|EngineCore encountered")
_INVALID = re.compile(r"\d+ validation errors? for \w+$")
"""Pydantic names the fields, and what is wrong with them, on the lines after it."""
_LABEL = re.compile(r"^\([^)]*\) ")
_MOST_LOG, _MOST_ERRORS = 20 * 2**20, 10
ENDING, LEAVING = 5.0, 8.0
"""Seconds that the last requests have to be told, and vLLM's processes to end once they were told; nothing is lost with them.
``terminationGracePeriodSeconds`` and its like must be longer than ``--shutdown-timeout`` and both."""
_PR_SET_PDEATHSIG = 1


class Supervisor:
    """command: vLLM's server; address: where it answers; ready: the line to show then; shutdown_timeout: seconds that
    running requests have to finish; verbose: show vLLM's own output."""

    def __init__(self, command: list[str], address: str, ready: str, shutdown_timeout: float, verbose: bool):
        self.command, self.address, self.ready = command, address.rstrip("/"), ready
        self.shutdown_timeout, self.verbose = shutdown_timeout, verbose
        self.state = ServerState.make()
        self.log = Path(f"{self.state.folder}.log")
        self.cause, self._raised, self._wanted = "", False, 0
        self.tail: deque[str] = deque(maxlen=20)
        self.is_ready = threading.Event()
        self.stopping = threading.Event()
        self._errors: deque[float] = deque(maxlen=_MOST_ERRORS)
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """Start the server and stay until it has ended. Returns the exit code: 0 when it was told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        started = time.monotonic()
        _say(f"starting; vLLM needs half a minute to a few minutes, and writes to {self.log}")
        self._process = process = subprocess.Popen(
            self.command,
            env={**os.environ, FOLDER: str(self.state.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        reader.start()
        threading.Thread(target=self._wait_until_ready, args=(started,), daemon=True).start()
        try:
            while process.poll() is None and not self.stopping.wait(0.2):
                pass
            if self.stopping.is_set() and process.poll() is None:
                self._stop(process)
            reader.join(2)
            if self.stopping.is_set():
                _say("stopped")
                return 0
            self._explain(process.returncode)
            return process.returncode if 0 < process.returncode < 128 else 1
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(self.state.folder, ignore_errors=True)

    def _on_signal(self, *_: Any) -> None:
        """The first signal drains; a second one does not wait any longer."""
        if self.stopping.is_set():
            self.shutdown_timeout = 0.0
        self.state.drain()
        self.stopping.set()

    def _stop(self, process: subprocess.Popen[str]) -> None:
        running = self.state.running()
        if running:
            _say(f"stopping: {running} running, at most {self.shutdown_timeout:g} s; new requests get 503")
        started = time.monotonic()
        while self.state.running() and process.poll() is None and time.monotonic() - started < self.shutdown_timeout:
            time.sleep(0.1)
        if self.state.running():
            _say(f"ending {self.state.running()} that did not finish")
            self.state.end()
            self._until(lambda: not self.state.running() or process.poll() is not None, ENDING)
        time.sleep(0.1)  # the last bytes of the last answer
        process.terminate()
        self._until(lambda: process.poll() is not None, LEAVING)

    def _until(self, done: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _read(self, lines: Any) -> None:
        """Keep what vLLM says in the log file, and show of it what an operator must see."""
        log = _Log(self.log)
        for line in lines:
            log.write(line)
            self.tail.append(line.rstrip()[:500])
            if self._wanted:
                self._add_detail(line)
            found = None if _QUIETER.search(line) else _ERROR.search(line)
            if found and not _FOLLOWS.search(line):
                self._note(found, _RAISED.match(line))
            if self.verbose:
                _show(line)
            elif found and self.is_ready.is_set() and not self.stopping.is_set():
                self._show_error(found.group(0))
        log.close()

    def _note(self, named: re.Match[str], raised: re.Match[str] | None) -> None:
        """The first error that was raised is why a server died, and else the first that was named."""
        best = raised or named
        if not self.cause or (raised and not self._raised):
            self.cause = f"{best.group(1)}: {best.group(2).strip()}"
            self._raised = raised is not None
            self._wanted = 2 if _INVALID.search(self.cause) else 0

    def _add_detail(self, line: str) -> None:
        """One of the lines that say what an error is about."""
        self._wanted -= 1
        detail = _LABEL.sub("", line).strip().partition(" [type=")[0]
        if detail.startswith("For further information"):
            self._wanted = 0
        else:
            self.cause = f"{self.cause}: {detail}"[:1000]

    def _show_error(self, text: str) -> None:
        """Ten errors a minute; the rest are in the log."""
        now = time.monotonic()
        if len(self._errors) == _MOST_ERRORS and now - self._errors[0] < 60:
            return
        self._errors.append(now)
        _say(text[:300])

    def _wait_until_ready(self, started: float) -> None:
        while not self.stopping.is_set() and self._process is not None and self._process.poll() is None:
            if self._answers():
                self.cause, self._raised, self._wanted = "", False, 0
                self.is_ready.set()
                _say(f"ready after {time.monotonic() - started:.0f} s: {self.ready}")
                return
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            # This machine's own server: whose certificate it shows does not matter here.
            context = ssl._create_unverified_context() if self.address.startswith("https:") else None
            with urllib.request.urlopen(f"{self.address}/health", timeout=5, context=context) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def _explain(self, code: int) -> None:
        when = "died" if self.is_ready.is_set() else "did not start"
        _say(f"error: the server {when} (status {code}): {self.cause or 'no error was written; the last lines were:'}")
        if not self.cause:
            _show("".join(f"  {line}\n" for line in self.tail))
        _say(f"everything it wrote is in {self.log}")


class _Log:
    """The log file, of at most twice 20 MB, for its owner only (a traceback may hold a client's words). A disk that is full ends the log
    and not the reading of what vLLM says: with a full pipe vLLM would wait for ever."""

    def __init__(self, path: Path):
        self.path, self._size, self._failed = path, 0, False
        self._file: TextIO | None = None

    def write(self, line: str) -> None:
        """Keep a line."""
        if self._failed:
            return
        try:
            if self._file is None or self._size > _MOST_LOG:
                self._next()
            assert self._file is not None
            self._size += self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._failed = True
            _say(f"{self.path} cannot be written ({error.strerror}); the server goes on without a log")

    def close(self) -> None:
        """No more lines come."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
            self.path.replace(f"{self.path}.1")
        # Never a file that somebody put there.
        self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
        self._size = 0


def _end_with_parent() -> None:
    """vLLM must not outlive this process, whatever ends it (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(text: str) -> None:
    _show(f"mllm serve: {text}\n")


def _show(text: str) -> None:
    """On the terminal, where there is one still."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def main() -> None:
    """Supervise what the environment names."""
    sys.exit(Supervisor(**json.loads(os.environ.pop(ENVIRONMENT))).run())


if __name__ == "__main__":
    main()
