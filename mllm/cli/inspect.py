"""``mllm inspect``: one HTML page of what the model really sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`mllm recipes ls`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes as key.sub=value, the same as for `mllm train`.", show_default=False),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Samples of each stage; rows are shown whole.")] = 8,
    stage: Annotated[str | None, typer.Option(help="Only this stage; default: every supervised one.")] = None,
    output: Annotated[Path | None, typer.Option(help="The page; default runs/<recipe>/inspect.html.")] = None,
) -> None:
    """One HTML page of what the model really sees: pixels, image tokens, loss mask, packing.

    The first samples of each stage as training will make them: every encoder's pixels after preprocessing, which token each
    patch becomes, the text coloured by whether it carries loss, where packed samples begin and their positions.
    The terminal shows one row of each stage, what is learned in green, and the tokens at which generation stops.
    Look at it before a long run: is the answer green and the question grey, is the image whole and upright, does anything leak
    into the next sample?

    [dim]mllm inspect demo --n 4 --stage sft[/]
    """
    from rich.console import Console

    from mllm.errors import ConfigError
    from mllm.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if stage is not None and stage not in (names := [known.name for known in loaded.stages]):
        raise ConfigError(f"--stage {stage}: {loaded.name} has the stages {', '.join(names)}")
    from mllm.train.preflight.inspection import inspect_recipe
    from mllm.train.preflight.inspection_page import write_page

    seen = inspect_recipe(loaded, num_samples=n, stage=stage)
    console = Console()
    path = write_page(seen, output or loaded.output_dir / "inspect.html", title=f"What {loaded.name} sees")
    for part in seen:
        learned = sum(s.num_learned for row in part.rows for s in row.samples)
        tokens = sum(s.length for row in part.rows for s in row.samples)
        slots = sum(row.slots for row in part.rows)
        if part.first is not None:
            console.print(part.first, soft_wrap=True)
        for note in part.notes:
            console.print(f"{part.stage.name}: {note}", highlight=False, markup=False, soft_wrap=True)
        typer.echo(
            f"{part.stage.name}: {part.num_samples} samples in {len(part.rows)} rows, {tokens} of {slots} slots used, "
            f"{learned} tokens carry loss" + (f", {len(part.dropped)} samples dropped" if part.dropped else "")
        )
    typer.echo(f"page: {path}")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(inspect)
