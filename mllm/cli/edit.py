"""``mllm edit``: have a checkpoint change a picture as an instruction says, and leave the rest as it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mllm.cli import arguments
from mllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor


def edit(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A checkpoint folder (or hub id) whose model has a segmentation head and one that draws."),
    ],
    picture: Annotated[Path, typer.Argument(help="The picture, a square one.")],
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the edited picture (PNG).")] = Path(
        "edited.png"
    ),
    mask: Annotated[
        Path | None,
        typer.Option(help="Picture whose bright pixels are painted anew, in place of what the model marks."),
    ] = None,
    save_mask: Annotated[
        Path | None, typer.Option(help="File for what was painted anew, white on black (PNG).")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Probability above which a pixel is marked; default: the head's own."),
    ] = None,
    feather: Annotated[int, typer.Option(min=0, help="Pixels around the mask over which old and new are mixed.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of the diffusion decoder.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance of the diffusion decoder; 1: none.")] = None,
    seed: Annotated[int, typer.Option(help="Of the diffusion decoder's noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Mark what an instruction names, draw what it becomes, paint that inside the mark.

    [dim]mllm edit runs/focus_demo/model/final scene.png "Make the red square blue." -o edited.png[/]
    """
    arguments.checkpoint(checkpoint)
    arguments.dtype(dtype)
    arguments.pictures([picture], "PICTURE")
    arguments.pictures(None if mask is None else [mask], "--mask")
    for path, option in ((output, "--output"), (save_mask, "--save-mask")):
        if path is not None and path.is_dir():
            raise ConfigError(f"{option} {path} is a folder; expected a PNG file")
    import torch
    from transformers import AutoProcessor

    from mllm.damage import opening
    from mllm.heads.build import drawing_head
    from mllm.heads.editing import edit_pictures, side_of
    from mllm.heads.segmentation.build import segmentation_heads
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.processing.images import image_size
    from mllm.processing.mask_files import box_of

    with opening(checkpoint):
        model = MllmForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        processor = AutoProcessor.from_pretrained(checkpoint)
    if drawing_head(model.config.heads) is None or not segmentation_heads(model.config.heads):
        heads = ", ".join(model.config.heads or {}) or "none"
        raise ConfigError(
            f"{checkpoint}: this model does not edit; its heads are {heads}, and an edit takes one of type segmentation and one that draws "
            "(see recipes/focus_demo.yaml)"
        )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    given = None if mask is None else read_mask(mask, side_of(model))
    (made,) = edit_pictures(
        model, [str(picture)], [instruction], processor=processor, masks=given, threshold=threshold, feather=feather,
        steps=steps, guidance=guidance, seed=seed,
    )  # fmt: skip
    for path in (output, save_mask):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    made.pil().save(output, "PNG")
    if save_mask is not None:
        from PIL import Image

        Image.fromarray(made.mask.cpu().numpy()).save(save_mask, "PNG")
    typer.echo(made.text)
    if (size := image_size(str(picture), where=f"PICTURE {picture}")) != (len(made.mask),) * 2:
        typer.echo(
            f"drawn at the model's own {len(made.mask)} × {len(made.mask)} pixels; the picture has {size[1]} × {size[0]}"
        )
    box, side = box_of(made.mask.cpu().numpy()), len(made.mask)
    where = "nothing, as nothing is marked" if box is None else f"x {box[0]}, y {box[1]}, {box[2]} × {box[3]} pixels"
    typer.echo(f"painted anew: {where}, of {side} × {side}\n{output}")


def read_mask(path: Path, side: int) -> Tensor:
    """What a file's bright pixels mark ``(1, side, side)`` bool. Raises `DataError` for a picture that marks nothing, or is not square."""
    import numpy as np
    import torch

    from mllm.processing.images import load_image

    picture = load_image(str(path), where="--mask").convert("L")
    if picture.width != picture.height:
        raise DataError(
            f"--mask {path}: {picture.width} × {picture.height} pixels; expected a square, as the picture is"
        )
    found = torch.from_numpy(np.asarray(picture.resize((side, side), 0)) > 127)[None]
    if not found.any():
        raise DataError(
            f"--mask {path}: no pixel is brighter than half, so nothing would be painted; white marks what is"
        )
    return found


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(edit)
