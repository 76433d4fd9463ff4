"""``mllm recipes``: list, show, copy recipes; print their JSON schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

recipes = typer.Typer(
    help="Recipes: what is shipped, what one says, a copy to edit, the schema for your editor.", no_args_is_help=True
)


@recipes.command("ls")
def list_recipes() -> None:
    """Every recipe that is found, with what it needs."""

    from mllm import assets
    from mllm.cli.tables import show, table
    from mllm.errors import ConfigError
    from mllm.recipe import load_recipe

    shown = table("recipe", "what", "stages", "hardware", names=("recipe",))
    for name, path in assets.iterate("recipes"):
        try:
            recipe = load_recipe(str(path))
        except ConfigError as error:
            shown.add_row(name, f"[red]{str(error).splitlines()[0]}[/]", "", "")
            continue
        hardware = " · ".join(part for part in (recipe.hardware.gpus, recipe.hardware.hours) if part)
        shown.add_row(name, recipe.description, " → ".join(stage.name for stage in recipe.stages), hardware)
    show(shown)


@recipes.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Recipe's name or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value", show_default=False)] = None,
) -> None:
    """The recipe with every default written out."""
    import yaml

    from mllm.recipe import load_recipe

    typer.echo(
        yaml.safe_dump(
            load_recipe(name, overrides).model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
        )
    )


@recipes.command("cp")
def copy(
    name: Annotated[str, typer.Argument(help="Recipe's name or file.")],
    target: Annotated[Path, typer.Argument(help="File or folder to write; an existing file is not overwritten.")],
) -> None:
    """Copy a recipe to edit it."""
    from mllm import assets
    from mllm.errors import ConfigError

    source = assets.find("recipes", name, kind="recipe")
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise ConfigError(f"{target} exists; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    typer.echo(f"{target}\nnext: mllm train {target}")


@recipes.command("schema")
def schema() -> None:
    """JSON schema of a recipe, for completion in editors; every key with its sentence."""
    from mllm.config import described_schema
    from mllm.recipe import Recipe

    typer.echo(json.dumps(described_schema(Recipe), indent=2, ensure_ascii=False))


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(recipes, name="recipes")
