"""``mllm convert`` and ``mllm export``: weights in from other formats, a self-contained checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments


def convert(
    source: Annotated[
        str, typer.Argument(help="LLaVA-1.5 checkpoint (HF or original layout) or Prismatic run folder.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not hold a checkpoint yet.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = "auto",
    language_model: Annotated[
        str | None, typer.Option(help="Prismatic: path or hub id of the LLM's config and tokenizer.")
    ] = None,
) -> None:
    """Turn a known checkpoint into ours."""
    if not Path(source).is_dir():
        arguments.checkpoint(source)
    arguments.new_folder(target)
    arguments.dtype(dtype)
    from mllm.models.foreign.convert import convert as convert_checkpoint

    typer.echo(f"written: {convert_checkpoint(source, target, dtype=dtype, language_model=language_model)}")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of ours, or a PEFT adapter trained on one.")],
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
) -> None:
    """Write one self-contained checkpoint: adapters merged, dtype chosen, sharded."""
    arguments.checkpoint(checkpoint)
    arguments.new_folder(target)
    arguments.dtype(dtype)
    arguments.shard_size(shard_size)
    from mllm.models.export import export as export_checkpoint

    made = export_checkpoint(checkpoint, target, dtype=dtype, shard_size=shard_size, remote_code=remote_code)
    typer.echo(f"written: {made}")


def add_to(app: typer.Typer) -> None:
    """Register both verbs."""
    app.command()(convert)
    app.command()(export)
