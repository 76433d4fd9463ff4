"""``mllm draw``: let a checkpoint with a visual head draw pictures from text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments
from mllm.errors import ConfigError


def draw(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder (or hub id) whose model has a visual head.")],
    prompts: Annotated[list[str], typer.Argument(help="What to draw; one picture each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")] = Path("drawings"),
    cfg_scale: Annotated[float, typer.Option(help="Guidance u + s (c - u); 1: none.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="0: the most likely codes.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely codes; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the codes that hold this share of the probability; 0: all.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Picture k is drawn with seed + k.")] = 0,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Picture that every prompt refers to (repeatable).")
    ] = None,
    decoder: Annotated[
        str,
        typer.Option(
            help="By what codes become pixels: plain, diffusion, or auto (diffusion where the checkpoint has it)."
        ),
    ] = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of the diffusion decoder.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance of the diffusion decoder; 1: none.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Draw one picture per prompt.

    [dim]mllm draw runs/unified_demo/model/final "Draw a 7." --cfg-scale 2[/]
    """
    arguments.checkpoint(checkpoint)
    arguments.dtype(dtype)
    arguments.pictures(image)
    if decoder not in ("auto", "plain", "diffusion"):
        raise ConfigError(f"--decoder {decoder}: one of auto, plain, diffusion is expected")
    if output.is_file():
        raise ConfigError(f"--output {output} is a file; expected a folder")
    import torch
    from transformers import AutoProcessor

    from mllm.damage import opening
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.types import IMAGE_MARK, Turn
    from mllm.visual_tokenizers.painting import Painting

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with opening(checkpoint):
        model = MllmForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
        processor = AutoProcessor.from_pretrained(checkpoint)
    conversations = [[Turn("user", IMAGE_MARK * len(image or []) + prompt)] for prompt in prompts]
    drawn = model.generate_images(
        conversations,
        processor=processor,
        images=[[str(path) for path in image] for _ in prompts] if image else None,
        cfg_scale=cfg_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        painting=Painting(decoder, steps, guidance),  # type: ignore[arg-type]
    )
    output.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(drawn.pil()):
        path = output / f"{number:03d}.png"
        picture.save(path)
        typer.echo(f"{path}  {prompts[number]}")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(draw)
