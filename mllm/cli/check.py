"""``mllm check``: run the project's own contract assertions on a component."""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    name: Annotated[str, typer.Argument(help="A registered name, or a shipped encoder entry; see `mllm list`.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="Where several go by the name: encoder, connector, router, visual-tokenizer, branch, head, metric, generator, format."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Generators: the checkpoint that answers the check's questions.")
    ] = None,
) -> None:
    """Does a component keep the contract? What is asserted of the project's own is asserted of a plug-in's.

    Encoders, connectors, routers, visual tokenizers, heads: shapes, token counts, meta build, save and load, dtype, gradients, empty
    batch. Metrics: odd replies, aggregates. Generators: every request answered once. Dataset formats: rows, marks, pictures.

    [dim]mllm check my-encoder --plugin my_encoder.py[/]
    """
    from mllm.errors import MllmError, UnknownName
    from mllm.testing import find_check

    found, run = find_check(name, kind=kind, checkpoint=checkpoint)
    try:
        run()
    except UnknownName:
        raise
    except AssertionError as error:
        raise MllmError(f"{found} {name!r} breaks the contract: {error}") from error
    typer.echo(f"{found} {name!r} keeps the contract")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(check)
