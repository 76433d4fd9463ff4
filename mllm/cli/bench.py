"""``mllm bench``: how fast is what was trained?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments

bench = typer.Typer(no_args_is_help=True, help="Measure speed: mllm bench serve.")


@bench.callback()
def _group() -> None:
    """Measure speed."""


@bench.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def bench_serve(
    context: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Argument(help="A checkpoint to start a server for; what follows -- goes to mllm serve.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="Address of a running server instead.")] = None,
    clients: Annotated[
        str, typer.Option(help="Clients at once; several numbers by comma, one after the other.")
    ] = "1,8,32",
    seconds: Annotated[float, typer.Option(help="How long each number of clients asks.")] = 30.0,
    pictures: Annotated[int, typer.Option(help="Pictures of a request.")] = 1,
    sides: Annotated[str, typer.Option(help="Pixels of a picture's sides: 640, or from-to as 64-1600.")] = "640",
    max_tokens: Annotated[int, typer.Option(help="Length of every answer.")] = 64,
    same_pictures: Annotated[
        bool, typer.Option("--same-pictures", help="Ask about the same 64 pictures again and again: what caches give.")
    ] = False,
    leaving: Annotated[float, typer.Option(help="Share of requests whose client goes away in mid-answer.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of pictures and questions.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything measured as JSON.")] = None,
) -> None:
    """Load a server with clients that ask about pictures: requests a second, time to the first token (median, 95 of 100),
    failures. Every picture is new to the server, so encoders run for each; exits with 1 when a request failed.

    [dim]mllm bench serve --server http://127.0.0.1:8000 --clients 1,8,32,128 -o load.json[/]

    [dim]mllm bench serve runs/demo/final --seconds 10 -- --eager[/]
    """
    from mllm.errors import ConfigError

    if (checkpoint is None) == (server is None):
        raise ConfigError("give a checkpoint to serve, or --server with the address of a running one")
    server = arguments.server(server)
    if checkpoint is not None:
        arguments.checkpoint(checkpoint, whole=True)
    levels = _numbers(clients, ",", "--clients")
    side = _numbers(sides, "-", "--sides")
    if len(side) > 2 or side[0] > side[-1] or min(side) < 8:
        raise ConfigError(f"--sides {sides}: expected pixels of 8 or more, such as 640 or 64-1600")
    arguments.at_least(seconds, 0.1, "--seconds")
    arguments.at_least(pictures, 0, "--pictures")
    arguments.at_least(max_tokens, 1, "--max-tokens")
    if not 0 <= leaving < 1:
        raise ConfigError(f"--leaving {leaving:g}: expected a share of requests from 0 to below 1")
    from mllm.serve.http.client import own_key
    from mllm.serve.load import Load, run_load

    load = Load(seconds, pictures, (side[0], side[-1]), max_tokens, same_pictures, leaving, seed)
    process = None
    if server is None:
        from mllm.serve.app import start_server

        process, server = start_server(str(checkpoint), list(context.args))
    typer.echo(
        f"{'clients':>8} {'req/s':>8} {'tok/s':>8} {'first token ms':>20} {'answer ms':>20} {'answered':>9} {'failed':>7}"
    )
    try:
        pid = process.pid if process else None
        measured = run_load(server, levels, load, api_key=own_key(), pid=pid, tell=_tell)
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)
    if output is not None:
        output.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    if any(level["failed"] for level in measured["levels"]):
        raise typer.Exit(1)


def _tell(level: object) -> None:
    from mllm.serve.load import CLIENT_LIMIT

    values = vars(level)
    first, whole = (
        f"{times.get('p50', 0):.0f} / {times.get('p95', 0):.0f}"
        for times in (values["first_token_ms"], values["latency_ms"])
    )
    typer.echo(
        f"{values['clients']:>8} {values['requests_per_second']:>8.2f} {values['tokens_per_second']:>8.1f} {first:>20} {whole:>20} "
        f"{values['answered']:>9} {values['failed']:>7}"
    )
    for message, number in values["errors"].items():
        typer.echo(f"         {number} × {message}", err=True)
    if values["client_busy"] > CLIENT_LIMIT:
        typer.echo(
            f"         these clients took {values['client_busy']:.0%} of their core: they may be the limit, not the server",
            err=True,
        )


def _numbers(text: str, between: str, option: str) -> list[int]:
    from mllm.errors import ConfigError

    parts = [part.strip() for part in text.split(between)]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} {text}: expected whole numbers above 0, such as 1{between}32")
    return [int(part) for part in parts]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.add_typer(bench, name="bench")
