"""How are a server and its page started together, and what happens to the page when the server dies?"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from mllm.errors import UnavailableError
from mllm.serve.http.client import ServerClient, own_key

MOST_STARTS = 3
"""How often a server that ended by itself is started again within ten minutes."""


class KeptServer:
    """A server of our own: started, watched, and started again when it ends by itself."""

    def __init__(self, checkpoint: str, options: list[str]):
        self.checkpoint, self.options = checkpoint, options
        self.process, self.address = start_server(checkpoint, options)
        self.key = own_key()
        self.stopping = threading.Event()
        self.died: list[float] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def state(self) -> str:
        """The page's line on how the server is."""
        from mllm.serve.page import status_line

        if ServerClient(self.address, self.key, timeout=2.0).answers():
            return status_line("good", "server ready")
        if not self.died:
            return status_line("waiting", "the server does not answer yet")
        at = time.strftime("%H:%M:%S", time.localtime(self.died[-1]))
        if self.given_up:
            text = f"the server died at {at}, too often to start it again; what it said is in the terminal"
            return status_line("bad", text)
        return status_line(
            "waiting", f"the server died at {at}; it is started again, which takes half a minute or more"
        )

    @property
    def given_up(self) -> bool:
        """Whether it died too often."""
        return len([at for at in self.died if at > time.time() - 600]) > MOST_STARTS

    def stop(self) -> None:
        """End it."""
        self.stopping.set()
        self.process.terminate()
        self.process.wait(60)

    def _watch(self) -> None:
        while not self.stopping.wait(0.5):
            if self.process.poll() is None:
                continue
            self.died.append(time.time())
            if self.given_up:
                return
            port = self.address.rsplit(":", 1)[1]
            self.process = subprocess.Popen(_command(self.checkpoint, port, self.options))


def run_page(
    checkpoint: str | None,
    *,
    server: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    serve_options: list[str] | None = None,
) -> None:
    """Show the page until interrupted; without ``server``, start one for the checkpoint and stop it at the end."""
    # What is started here ends with it; as the first process of a container it would not even hear the signal.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from mllm.serve.page import STYLE, build_page, marker

    kept: KeptServer | None = None
    mark = None
    if server is None:
        if checkpoint is None:
            raise UnavailableError("give a checkpoint to serve, or --server with the address of a running one")
        mark = marker(checkpoint)
        kept = KeptServer(checkpoint, serve_options or [])
        server = kept.address
    try:
        page = build_page(ServerClient(server, own_key()), mark=mark, state=kept.state if kept else None)
        options: dict[str, Any] = {"max_file_size": "32mb", "quiet": True, "show_error": True, "css": STYLE}
        queue = page.queue(default_concurrency_limit=8)
        queue.launch(server_name=host, server_port=port, share=False, prevent_thread_lock=True, **options)
        sys.stderr.write(
            f"mllm app: the page is at http://{host}:{page.server_port} (server {server}); Ctrl-C ends it\n"
        )
        sys.stderr.flush()
        page.block_thread()
    finally:
        if kept is not None:
            kept.stop()


def _command(checkpoint: str, port: str, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "mllm.cli.main", "serve", checkpoint, "--port", port, *options]


def start_server(checkpoint: str, options: list[str], timeout: float = 1800.0) -> tuple[subprocess.Popen, str]:
    """``mllm serve`` on a free loopback port, ready to answer. Raises `UnavailableError` when it ends before."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen(_command(checkpoint, str(port), options))
    address = f"http://127.0.0.1:{port}"
    try:
        client = ServerClient(address, own_key())
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise UnavailableError(
                    f"mllm serve {checkpoint} ended with status {process.returncode}; its output is above"
                )
            try:
                client.model()
                return process, address
            except UnavailableError:
                time.sleep(1)
    except BaseException:  # told to stop while it waits
        process.terminate()
        raise
    process.terminate()
    raise UnavailableError(f"mllm serve {checkpoint} was not ready after {timeout:.0f} s")
