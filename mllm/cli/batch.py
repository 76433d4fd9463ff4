"""``mllm batch``: answer a file of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments


def batch(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format, one JSON object a line.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="A checkpoint to start a server for; what follows -- goes to mllm serve.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="Address of a running server instead.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Answers, a line each; default: FILE.answers.jsonl.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
) -> None:
    """Answer every request of a file. Run again, it goes on where it stopped, and sends what failed once more; exits with
    1 while something has no answer.

    [dim]{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […]}}[/]

    [dim]mllm batch questions.jsonl --server http://127.0.0.1:8000[/]
    """
    from mllm.errors import ConfigError
    from mllm.serve.batch import read_requests, run_batch
    from mllm.serve.http.client import own_key

    if (checkpoint is None) == (server is None):
        raise ConfigError("give one of --checkpoint and --server")
    server = arguments.server(server)
    read_requests(file)  # what is wrong with the file is told before a server starts
    target = output or file.with_suffix(".answers.jsonl")
    process = None
    if server is None:
        from mllm.serve.app import start_server

        process, server = start_server(str(checkpoint), list(context.args))
    try:
        counts = run_batch(file, target, server, api_key=own_key(), concurrency=concurrency)
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)
    typer.echo(
        f"{counts.before + counts.answered} of {counts.total} answered ({counts.before} before), {counts.failed} failed: "
        f"{target}"
    )
    if counts.failed:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(batch)
