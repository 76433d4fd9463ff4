"""``mllm encoders``: which encoders are good for your pictures, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments

encoders = typer.Typer(help="Compare encoders on your pictures before you train.", no_args_is_help=True)


@encoders.command("probe")
def probe(
    data: Annotated[
        Path,
        typer.Argument(help="A folder with one subfolder a class, or a .jsonl file with image and label (or answer)."),
    ],
    names: Annotated[
        str,
        typer.Option(
            "--encoders", "-e", help="Comma separated: of `mllm list encoders`, or YAML files with an encoder's config."
        ),
    ],
    label: Annotated[
        str | None,
        typer.Option(help="Key of the class in a .jsonl row; default: label, or answer.", show_default=False),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only rows with KEY=VALUE (repeatable).", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many pictures, evenly over the classes.")] = 1000,
    random: Annotated[
        bool, typer.Option("--random", help="Draw the weights: what is an architecture worth untrained?")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for probe.html, probe.md and probe.json.")] = Path("runs/probe"),
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """Probe frozen features: linear and nearest-neighbour accuracy, effective rank, likeness of every two encoders, cost.

    Choose encoders that are good alone and unlike one another; a pair with a CKA near 1 sees the same twice.

    [dim]mllm encoders probe runs/demo/data/digits/test.jsonl --label answer -e efficientnet-lite0-448,ppocr-rec-448[/]
    """
    arguments.device(device)
    arguments.at_least(batch_size, 1, "--batch-size")
    arguments.at_least(limit, 4, "--limit")
    wanted = {}
    for text in where or []:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise typer.BadParameter(f"--where {text!r}: expected KEY=VALUE, such as kind=colour")
        wanted[key] = value
    from mllm.eval.studies.probe import labelled_pictures, run_probe
    from mllm.eval.studies.study import print_study

    pictures = labelled_pictures(data, label=label, where=wanted, limit=limit)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    study = run_probe(
        chosen,
        pictures,
        output,
        random=random,
        batch_size=batch_size,
        device=device,
        say=lambda text: typer.echo(text, err=True),
    )
    print_study(study)
    typer.echo(f"page: {output / 'probe.html'}")


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(encoders, name="encoders")
