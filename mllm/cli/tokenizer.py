"""``mllm tokenizer``: train a visual tokenizer, measure it, encode pictures with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

tokenizer = typer.Typer(help="Visual tokenizers: image ↔ discrete codes.", no_args_is_help=True)


@tokenizer.command("ls")
def list_recipes() -> None:
    """Shipped tokenizer recipes."""
    from rich.console import Console
    from rich.table import Table

    from mllm.config import read_yaml
    from mllm.visual_tokenizers.recipe import tokenizer_recipes

    table = Table("recipe", "what", box=None, pad_edge=False)
    for name, path in tokenizer_recipes().items():
        table.add_row(name, read_yaml(path).get("description", ""))
    Console().print(table)


@tokenizer.command("train")
def train(
    recipe: Annotated[str, typer.Argument(help="A tokenizer recipe (`mllm tokenizer ls`) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes as key.sub=value.", show_default=False)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output folder.")
    ] = False,
) -> None:
    """Train a tokenizer into <output>/final; several processes through torchrun.

    [dim]mllm tokenizer train tokenizer_demo_dual steps=200[/]
    """
    from mllm.visual_tokenizers.train import train_tokenizer

    typer.echo(json.dumps(train_tokenizer(recipe, overrides, resume), indent=2))


@tokenizer.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A saved tokenizer.")],
    recipe: Annotated[str, typer.Option(help="Recipe whose images are measured on (its held-out part).")],
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    probe: Annotated[
        bool, typer.Option(help="Linear-probe accuracy of the quantised features, where images have classes.")
    ] = True,
    grid: Annotated[
        Path | None, typer.Option(help="PNG of originals above reconstructions; default <folder>/grid.png.")
    ] = None,
) -> None:
    """PSNR, SSIM, tokens and bits per image, code usage, linear probe; a picture of originals and reconstructions."""
    from mllm.visual_tokenizers.base import VisualTokenizer
    from mllm.visual_tokenizers.evaluate import comparison_grid, evaluate_tokenizer, probe_tokenizer
    from mllm.visual_tokenizers.images import load_images, to_pixels
    from mllm.visual_tokenizers.recipe import load_tokenizer_recipe

    model = VisualTokenizer.from_pretrained(folder)
    spec = load_tokenizer_recipe(recipe).images
    images = load_images(spec, model.image.height, "test")
    result = evaluate_tokenizer(model, images, limit=limit)
    if probe and images.labels is not None:
        result["linear_probe"] = probe_tokenizer(model, load_images(spec, model.image.height, "train"), images)
    picture = grid or folder / "grid.png"
    comparison_grid(model, to_pixels(images.batch(range(min(8, len(images)))))).save(picture)
    typer.echo(json.dumps({**result, "grid": str(picture)}, indent=2))


@tokenizer.command("encode")
def encode(
    folder: Annotated[Path, typer.Argument(help="A saved tokenizer.")],
    recipe: Annotated[str, typer.Option(help="Recipe whose images are encoded.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the code shards; a second call goes on where the first ended.")
    ],
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
) -> None:
    """Write the codes of a recipe's images to disk, in shards; resumable."""
    from mllm.visual_tokenizers.base import VisualTokenizer
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.recipe import load_tokenizer_recipe
    from mllm.visual_tokenizers.storage import encode_images

    model = VisualTokenizer.from_pretrained(folder)
    images = load_images(load_tokenizer_recipe(recipe).images, model.image.height, split)
    typer.echo(f"{encode_images(model, images, output)} shards written to {output}")


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(tokenizer, name="tokenizer")
