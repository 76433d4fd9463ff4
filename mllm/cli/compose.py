"""``mllm compose``: an untrained checkpoint, joined from parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli import arguments
from mllm.errors import ConfigError


def compose(
    target: Annotated[Path, typer.Argument(help="Folder to write; must not hold a checkpoint yet.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe as key.sub=value.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Take the parts from this recipe; options below replace them.")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder",
            "-e",
            help="NAME=ENTRY of `mllm list encoders`, or NAME={preset: ENTRY, …} as in a recipe (repeatable).",
        ),
    ] = None,
    connector: Annotated[str | None, typer.Option(help="A name of `mllm list connectors`, or {type: NAME, …}.")] = None,
    language_model: Annotated[
        str | None, typer.Option(help="Hub id, folder or GGUF file of a causal language model.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Shipped template or Jinja file; default: the tokenizer's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Read no published weights: all parts start at random.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the parts that start at random.")] = 0,
) -> None:
    """Build a model from parts and save it untrained: published weights where a part has some, fresh ones elsewhere.

    It opens with from_pretrained, and chat, eval, serve and parity take it.

    [dim]mllm compose runs/composed -e vision=clip-vit-l-14-336 --connector mlp --language-model Qwen/Qwen2.5-0.5B-Instruct[/]

    [dim]mllm compose runs/composed --recipe llava_1_5 --dtype bfloat16[/]
    """
    from mllm import progress

    arguments.new_folder(target)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder")
    arguments.dtype(dtype, auto=False)
    spec = model_spec(recipe, overrides or [], encoder or [], connector, language_model, chat_template)
    progress.begin()
    with progress.phase("importing torch and transformers"):
        import torch

        from mllm.models.build import build_model
        from mllm.models.whole_folder import whole_folder
    torch.manual_seed(seed)
    model, processor = build_model(spec, dtype=getattr(torch, dtype), load_weights=not fresh)
    with whole_folder(target) as writing:
        model.save_pretrained(writing)
        processor.save_pretrained(writing)
    parts = " + ".join(model.config.encoders) or "no encoder"
    typer.echo(
        f"written: {target} ({parts} → {(spec.connector or {}).get('type')}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, untrained)\n"
        f"next: mllm chat {target} --image PICTURE, or a recipe of the same parts: mllm train RECIPE"
    )


def model_spec(
    recipe: str | None,
    overrides: list[str],
    encoders: list[str],
    connector: str | None,
    language_model: str | None,
    chat_template: str | None,
) -> Any:
    """The `ModelSpec` that recipe and options mean. Raises `ConfigError`."""
    from mllm.config import parse_yaml, validate
    from mllm.recipe import ModelSpec, load_recipe

    if recipe is None and (overrides or not encoders or language_model is None):
        raise ConfigError(
            "what is the model made of? Give --recipe NAME, or --encoder NAME=ENTRY (mllm list encoders) and --language-model SOURCE"
            + ("; key.sub=value changes a recipe" if overrides else "")
        )
    data: dict[str, Any] = {"connector": "mlp"}
    if recipe is not None:
        data = load_recipe(recipe, overrides).model.model_dump(mode="json")
    if encoders:
        data["encoders"] = {}
    for text in encoders:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise ConfigError(f"--encoder {text}: expected NAME=ENTRY, e.g. vision=clip-vit-l-14-336")
        data["encoders"][name] = parse_yaml(value, where=f"--encoder {name}")
    if connector is not None:
        data["connector"] = parse_yaml(connector, where="--connector")
    if language_model is not None:
        data["language_model"] = {"source": language_model}
    if chat_template is not None:
        data["chat_template"] = chat_template
    return validate(ModelSpec, data, where="model")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(compose)
