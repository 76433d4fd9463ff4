"""``mllm data freeze / rebuild``: a benchmark of charts that anyone can build again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments


def freeze(
    folder: Annotated[Path, typer.Argument(help="Folder that `mllm data build charts` wrote.")],
    manifest: Annotated[Path, typer.Argument(help="YAML file to write.")],
    description: Annotated[str, typer.Option(help="One line on what is asked.")] = "Questions about charts",
) -> None:
    """Write what somebody else's build of these test charts must equal: settings, versions, hashes of questions and pictures."""
    from mllm.data.charts.frozen import freeze as freeze_now

    frozen = freeze_now(folder, manifest, description=description)
    typer.echo(f"{manifest}: {frozen.num_questions} questions, {', '.join(frozen.pictures)}")


def rebuild(
    name: Annotated[str, typer.Argument(help="A frozen benchmark (data/frozen) or its YAML file.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/charts_test"),
    processes: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    renderers: Annotated[
        str | None, typer.Option(help="Only these renderers, comma separated; others' pictures are not compared.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where a package's tables are unpacked; default: in the output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a folder built with other settings.")] = False,
) -> None:
    """Draw a frozen benchmark's charts and compare: other questions are an error, other pixels are told by renderer.

    [dim]mllm data rebuild real_charts --processes 8[/]
    """
    arguments.at_least(processes, 1, "--processes")
    from mllm import progress
    from mllm.data.charts.frozen import rebuild as rebuild_now

    progress.begin()
    only = None if renderers is None else tuple(name.strip() for name in renderers.split(",") if name.strip())
    frozen, differences = rebuild_now(name, output, renderers=only, cache=cache, processes=processes, force=force)
    typer.echo(f"{output}: {frozen.num_questions} questions, the frozen ones")
    for line in differences or ["every picture is the frozen one"]:
        typer.echo(line)


def add_to(group: typer.Typer) -> None:
    """Register these verbs in ``mllm data``."""
    group.command("freeze")(freeze)
    group.command("rebuild")(rebuild)
