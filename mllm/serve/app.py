"""What does the demonstration page look like? Pictures, a question, the streamed answer, and who looked at the
pictures."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from mllm.errors import DataError, MllmError, UnavailableError
from mllm.install import install_hint
from mllm.serve.http.client import ServerClient

DECIDE = "the model decides"


def build_page(client: ServerClient) -> Any:
    """The Gradio page of a running server. Raises `UnavailableError` without gradio or server."""
    try:
        import gradio as gr
    except ImportError:
        raise UnavailableError(f"the page needs gradio: {install_hint('serve')}") from None
    name, information = client.model(), client.information()
    experts = information.get("experts", [])

    def answer(
        files: list[str] | None, question: str, chosen: list[str], max_tokens: float
    ) -> Iterator[tuple[str, str]]:
        routing = None if not experts or DECIDE in chosen else [e for e in chosen if e in experts]
        if not question.strip():
            yield "", "Ask something first."
            return
        text = ""
        try:
            yield "", "…"
            pieces = client.stream(
                question, files or [], experts=routing if files else None, max_tokens=int(max_tokens), model=name
            )
            for piece, routed in pieces:
                text += piece
                yield text, _describe(information, routed, bool(files))
        except (MllmError, OSError) as error:
            yield text, f"Refused: {error}" if isinstance(error, DataError) else f"Failed: {error}"

    with gr.Blocks(title=f"mllm: {name}", analytics_enabled=False) as page:
        gr.Markdown(f"# {name}")
        with gr.Row():
            with gr.Column():
                files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], elem_id="pictures")
                gallery = gr.Gallery(label="Preview", columns=2, height="auto", object_fit="contain")
                question = gr.Textbox(label="Question", lines=2, elem_id="question")
                chosen = gr.CheckboxGroup(
                    [DECIDE, *experts], value=[DECIDE], label="Experts", visible=bool(experts), elem_id="experts"
                )
                length = gr.Slider(16, 2048, value=256, step=16, label="Longest answer (tokens)")
                with gr.Row():
                    send = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop")
            with gr.Column():
                text = gr.Textbox(label="Answer", lines=16, elem_id="answer")
                routing = gr.Textbox(label="Who looked", lines=1, elem_id="routing")
        files.change(lambda paths: paths or [], files, gallery)
        inputs, outputs = [files, question, chosen, length], [text, routing]
        running: Any = [send.click(answer, inputs, outputs), question.submit(answer, inputs, outputs)]
        stop.click(None, cancels=running)
    return page


def _describe(information: dict[str, Any], routed: str | None, pictures: bool) -> str:
    if not pictures:
        return "no picture"
    if not information.get("experts"):
        return "all encoders"
    if routed is not None:
        return f"the always-on encoders and: {routed}"
    return f"the always-on encoders and what the {information.get('router')} router chose"


def run_page(
    checkpoint: str | None,
    *,
    server: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    serve_options: list[str] | None = None,
) -> None:
    """Show the page until interrupted; without ``server``, start one for the checkpoint and stop it at the end."""
    key = os.environ.get("MLLM_API_KEY")
    process = None
    if server is None:
        if checkpoint is None:
            raise UnavailableError("give a checkpoint to serve, or --server with the address of a running one")
        process, server = start_server(checkpoint, serve_options or [])
    try:
        page = build_page(ServerClient(server, key))
        page.queue(default_concurrency_limit=8).launch(
            server_name=host, server_port=port, share=False, max_file_size="32mb", quiet=True, show_error=True
        )
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)


def start_server(checkpoint: str, options: list[str], timeout: float = 1800.0) -> tuple[subprocess.Popen, str]:
    """``mllm serve`` on a free loopback port, ready to answer. Raises `UnavailableError` when it ends before."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "mllm.cli.main", "serve", checkpoint, "--port", str(port), *options]
    process = subprocess.Popen(command)
    address = f"http://127.0.0.1:{port}"
    client = ServerClient(address, os.environ.get("MLLM_API_KEY"))
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
    process.terminate()
    raise UnavailableError(f"mllm serve {checkpoint} was not ready after {timeout:.0f} s")
