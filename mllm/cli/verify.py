"""``mllm verify-resume``: does this recipe, on this machine, resume bit for bit?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify_resume(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`mllm recipes ls`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes as key.sub=value, the same as for `mllm train`.", show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes on this machine, as for `mllm train`.")] = 1,
    steps: Annotated[int, typer.Option(min=4, help="Steps of every stage; it is killed once after the third.")] = 6,
    keep: Annotated[
        Path | None, typer.Option(help="Keep both short runs and their log in this folder; default: none is kept.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Give up when a run takes longer than so many seconds.")] = 3600,
) -> None:
    """Does this recipe resume exactly on this machine? A few steps, killed and resumed, compared.

    Trains a few steps of every stage twice, once whole and once killed (SIGKILL) in every stage and resumed, and compares
    losses, gradient norms, rates and sample ids bit for bit (on one machine that is what resuming promises, on any
    processor; between machines rounding differs). Exit code 1 and one line for each difference when they differ.

    [dim]mllm verify-resume demo --steps 6[/]
    """
    from mllm.errors import ConfigError
    from mllm.recipe import load_recipe

    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise ConfigError(f"--keep {keep} is not empty; choose another folder")
    loaded = load_recipe(recipe, overrides)
    from mllm.train.preflight.verify import verify_resume as verify

    report = verify(loaded, processes=processes, steps=steps, folder=keep, limit=limit)
    for line in report.differences[:40]:
        typer.echo(line)
    if len(report.differences) > 40:
        typer.echo(f"and {len(report.differences) - 40} more")
    if not report.equal:
        typer.echo(f"NOT EXACT: {len(report.differences)} values differ over {report.compared} steps")
        raise typer.Exit(1)
    typer.echo(f"exact: {report.compared} steps of the killed and resumed run equal the whole run bit for bit")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("verify-resume")(verify_resume)
