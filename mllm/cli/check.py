"""``mllm check``: run the project's own contract assertions on a component."""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    name: Annotated[str, typer.Argument(help="A registered encoder, connector or router, or a shipped encoder entry.")],
    plugin: Annotated[list[str] | None, typer.Option(help="Plugin module or .py file that registers it.")] = None,
) -> None:
    """Does a component keep the contract: shapes, token counts, meta build, save and load, dtype, gradients, empty batch?

    [dim]mllm check my-encoder --plugin my_encoder.py[/]
    """
    from mllm.errors import MllmError, UnknownName
    from mllm.plugins import load_plugins
    from mllm.testing import find_check

    load_plugins(plugin or [])
    kind, run = find_check(name)
    try:
        run()
    except UnknownName:
        raise
    except AssertionError as error:
        raise MllmError(f"{kind} {name!r} breaks the contract: {error}") from error
    typer.echo(f"{kind} {name!r} keeps the contract")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(check)
