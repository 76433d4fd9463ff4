"""``mllm data``: check a training file before paying for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments

data = typer.Typer(help="Look at training data: what is broken, how long samples are.", no_args_is_help=True)


@data.command("check")
def check(
    source: Annotated[
        str, typer.Argument(help="A dataset's name (`mllm list datasets`), its YAML, a file, a folder, or a hub id.")
    ],
    image_root: Annotated[
        Path | None,
        typer.Option("--image-root", "--images", help="Folder that image paths start from; default: beside the file."),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint (or tokenizer) to count tokens with.")] = None,
    write_quarantine: Annotated[
        bool, typer.Option("--write-quarantine", help="Write the list of bad samples that training leaves out.")
    ] = False,
    quarantine: Annotated[
        Path | None, typer.Option(help="Write that list here; default: beside the file, where training looks.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples.")] = None,
) -> None:
    """Report corrupt images, missing files, mismatched placeholders, samples without labels, duplicates and lengths.

    Nothing is written unless you ask for it: --write-quarantine makes the list of bad rows that training leaves out, each for
    as long as the files it was judged by stay as they are."""
    arguments.training_data(source)
    if checkpoint is not None and not Path(checkpoint).is_dir():  # a folder may hold a tokenizer alone
        arguments.checkpoint(checkpoint)
    arguments.at_least(processes, 1, "--processes")
    arguments.at_least(limit, 1, "--limit")
    from mllm.data.check import check_source

    report = check_source(
        source,
        image_root=image_root,
        checkpoint=checkpoint,
        quarantine=quarantine,
        write=write_quarantine,
        processes=processes,
        limit=limit,
    )
    report.print()
    if report.num_bad:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(data, name="data")
