"""``mllm data points``: where the scenes of videos lie, by an encoder that sees their frames together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments

_ENCODERS = (
    "vggt-1b", "da3-base", "da3-small", "da3-large", "da3-giant", "pi3",
    "mapanything", "mapanything-apache", "mapanything-v1", "mapanything-apache-v1",
)  # fmt: skip
"""Presets with a head that tells points."""


def points(
    videos: Annotated[list[Path], typer.Argument(help="Video files, animations or folders of frames.")],
    encoder: Annotated[str, typer.Option(help=f"{', '.join(_ENCODERS[:-1])} or {_ENCODERS[-1]}.")] = "vggt-1b",
    weights: Annotated[
        str | None, typer.Option(help="Its whole checkpoint: a folder, a file or a hub id; default: the preset's.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of each video, evenly from first to last.")] = 128,
    size: Annotated[
        int | None, typer.Option(help="Pixels of a frame's longer side; default: the encoder's own (518; da3 504).")
    ] = None,
    side: Annotated[int, typer.Option(help="Most points kept along a side; 0: all.")] = 64,
    chunk: Annotated[
        int | None, typer.Option(help="Most frames that see each other at once; default: all (memory grows with them).")
    ] = None,
    rays: Annotated[
        bool, typer.Option("--rays", help="da3: cameras from its map of rays (slower, its authors say more exact).")
    ] = False,
    cameras: Annotated[
        bool,
        typer.Option(
            "--cameras", help="Also VIDEO.poses.json and VIDEO.depth.npy, for a row's poses and depths (not vggt-1b)."
        ),
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU when there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Also for videos that have such a file.")] = False,
) -> None:
    """Write VIDEO.points.npz beside each video: where what its frames show lies, as VGGT, Depth Anything 3, π³ or MapAnything says.

    It is what video: {which: space_aware} and encoders of type points read where rows have no depth and poses of their own.
    da3-base, da3-small and mapanything-apache (in metres) are free to use, the others' weights not commercially.

    With --cameras a row can give what heads learn from, too: "poses": "room.mp4.poses.json", "depths": "room.mp4.depth.npy".

    [dim]mllm data points rooms/*.mp4 --frames 64 --chunk 32[/]
    """
    for value, option, low in (
        (frames, "--frames", 1), (size, "--size", 14), (side, "--side", 0), (chunk, "--chunk", 2)
    ):  # fmt: skip
        arguments.at_least(value, low, option)
    arguments.one_of(encoder, _ENCODERS, "--encoder")
    if rays and not encoder.startswith("da3"):
        raise typer.BadParameter(f"{encoder} tells no rays; give it with --encoder da3-base", param_hint="--rays")
    if cameras and encoder == "vggt-1b":
        raise typer.BadParameter(
            "vggt-1b's point head tells no cameras; give it with --encoder da3-base, pi3 or mapanything-apache",
            param_hint="--cameras",
        )
    arguments.dtype(dtype)
    arguments.device(device)
    arguments.videos(videos)
    import torch

    from mllm.data.scene_points import PointWriter, write_points
    from mllm.visual_tokenizers.running import choose_device

    where = choose_device(device or "auto")
    kind = "bfloat16" if where.type == "cuda" else "float32"
    source = {} if weights is None else {"weights": {"source": weights}}
    writer = PointWriter(
        encoder={"preset": encoder, **source},
        frames=frames,
        size=size,
        side=side or None,
        chunk=chunk,
        by_rays=rays,
        cameras=cameras,
        device=where,
        dtype=getattr(torch, kind if dtype == "auto" else dtype),
    )
    for _, target, count in write_points(writer, videos, force=force):
        told = "is there already (--force writes it again)" if count is None else f"points of {count} frames"
        typer.echo(f"{target}: {told}")
