"""``mllm convert``, ``export`` and ``push``: weights in from other formats, a self-contained checkpoint out, to the hub."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments

WithoutLanguageModel = Annotated[
    bool,
    typer.Option(
        "--without-language-model",
        help="What was trained alone: connector, encoders, heads, added rows, LoRA adapters; the published language model, and encoders "
        "that did not learn, are named with their hashes. It opens like the whole checkpoint; `mllm export` makes that again.",
    ),
]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="LLaVA-1.5 (HF or original layout), LLaVA-NeXT, LLaVA-OneVision or InternVL checkpoint, Prismatic run folder, or a "
            "recipe of an earlier version (.yaml)."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not hold a checkpoint yet.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = "auto",
    language_model: Annotated[
        str | None, typer.Option(help="Prismatic: path or hub id of the LLM's config and tokenizer.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Shipped template or Jinja file; default: as the checkpoint's language model is known to be asked."
        ),
    ] = None,
) -> None:
    """Turn a known checkpoint, or a recipe that an earlier version wrote, into ours.

    [dim]mllm convert my_recipe.yaml my_recipe_now.yaml[/]
    """
    if source.endswith((".yaml", ".yml")):
        from mllm.former_recipes import convert_recipe

        typer.echo(f"written: {convert_recipe(source, target)}")
        return
    if not Path(source).is_dir():
        arguments.checkpoint(source)
    arguments.new_folder(target)
    arguments.dtype(dtype)
    from mllm.models.foreign.convert import convert as convert_checkpoint

    made = convert_checkpoint(source, target, dtype=dtype, language_model=language_model, chat_template=chat_template)
    typer.echo(f"written: {made}")


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint of ours, a PEFT adapter trained on one, or what --without-language-model wrote: a whole checkpoint "
            "is made of it again."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Put the code beside the weights: opens with trust_remote_code=True where this toolkit is not installed.",
        ),
    ] = False,
    without_language_model: WithoutLanguageModel = False,
) -> None:
    """Write one self-contained checkpoint: adapters merged, dtype chosen, sharded."""
    arguments.checkpoint(checkpoint)
    arguments.new_folder(target)
    arguments.dtype(dtype)
    arguments.shard_size(shard_size)
    from mllm.models.export import export as export_checkpoint

    made = export_checkpoint(
        checkpoint,
        target,
        dtype=dtype,
        shard_size=shard_size,
        remote_code=remote_code,
        without_language_model=without_language_model,
    )
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    typer.echo(f"written: {made} ({size / 1e6:.1f} MB)")


def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, such as runs/my/final.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if it is not there.")],
    scores: Annotated[
        Path | None, typer.Option(help="Folder of an evaluation, for the card; default: eval beside the checkpoint.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload a checkpoint",
    without_language_model: WithoutLanguageModel = False,
    card_only: Annotated[bool, typer.Option("--card-only", help="Print the model card and send nothing.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent (files, sizes, licences) and send nothing.")
    ] = False,
) -> None:
    """Send a checkpoint to the hub with a model card: encoders and their licences, recipe, scores with their rules.

    Log in first with `hf auth login`, or set HF_TOKEN. A README.md of your own in the folder is kept.

    [dim]mllm push runs/demo/final me/my-model --private[/]
    """
    arguments.checkpoint(checkpoint)
    from mllm.models.card import model_card, planned
    from mllm.models.card import push as push_checkpoint

    with ExitStack() as made:
        if without_language_model:
            from mllm.models.export import evaluation_beside
            from mllm.models.export import export as export_checkpoint

            place = Path(made.enter_context(tempfile.TemporaryDirectory()))
            scores = scores or evaluation_beside(checkpoint)
            checkpoint = export_checkpoint(checkpoint, place / "parts", without_language_model=True)
        if card_only:
            typer.echo(model_card(checkpoint, repository, scores=scores))
            return
        if dry_run:
            upload = planned(checkpoint, repository, scores=scores)
            for name, size in upload.files:
                typer.echo(f"{_size(size):>10}  {name}")
            for part, source, licence, commercial in upload.licences:
                typer.echo(f"{part}: {source}; licence {licence}, commercial use {commercial}")
            whose = "written by mllm push (--card-only prints it)" if upload.writes_card else "your own README.md"
            total = _size(sum(size for _, size in upload.files))
            typer.echo(
                f"nothing was sent: {len(upload.files)} files, {total}, would go to {repository}; model card: {whose}"
            )
            return
        sent = push_checkpoint(checkpoint, repository, scores=scores, private=private, message=message)
        typer.echo(f"pushed: {sent}")


def _size(number: int) -> str:
    """Bytes as people read them."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= u), (1, "B"))
    return f"{number / unit:.1f} {name}" if unit > 1 else f"{number} B"


def add_to(app: typer.Typer) -> None:
    """Register the three verbs."""
    app.command()(convert)
    app.command()(export)
    app.command()(push)
