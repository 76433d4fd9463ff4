"""``mllm data``: check a training file before paying for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(help="Look at training data: what is broken, how long samples are.", no_args_is_help=True)


@data.command("check")
def check(
    source: Annotated[
        str, typer.Argument(help="A dataset's name (`mllm list datasets`), its YAML, or a json/jsonl file.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to; default: beside the file.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint (or tokenizer) to count tokens with.")] = None,
    quarantine: Annotated[
        Path | None, typer.Option(help="Where to write the list of bad samples; training honours it.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples.")] = None,
) -> None:
    """Report corrupt images, missing files, mismatched placeholders, samples without labels, duplicates and lengths."""
    from mllm.data.check import check_source

    report = check_source(
        source, images=images, checkpoint=checkpoint, quarantine=quarantine, processes=processes, limit=limit
    )
    report.print()
    if report.num_bad:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(data, name="data")
