"""``mllm app``: a page in the browser to try a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from mllm.cli import arguments
from mllm.errors import ConfigError


def page(
    context: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Argument(help="A checkpoint folder (or hub id); a server is started for it.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of a running server instead, e.g. http://127.0.0.1:8000.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address the page listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
) -> None:
    """Pictures, a question, the streamed answer and the experts that looked. What follows -- goes to
    [bold]mllm serve[/]; the key, if any, is read from MLLM_API_KEY.

    [dim]mllm app runs/demo/final -- --eager[/]
    """
    if (checkpoint is None) == (server is None):
        raise ConfigError("give a checkpoint to serve, or --server with the address of a running one")
    server = arguments.server(server)
    if checkpoint is not None:
        arguments.checkpoint(checkpoint, whole=True)
    from mllm.serve.app import run_page
    from mllm.serve.options import check_port

    check_port(host, port)

    run_page(checkpoint, server=server, host=host, port=port, serve_options=list(context.args))


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("app", context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(page)
