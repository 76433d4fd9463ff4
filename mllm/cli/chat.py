"""``mllm chat``: talk to a checkpoint in the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments
from mllm.errors import ConfigError, MllmError, did_you_mean


def chat(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder (or hub id).")],
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="Picture, a file or an address, for the first question (repeatable)."),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option("--video", "-v", help="Video file or folder of frames, for the first question (repeatable)."),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Ask this one question, print the answer, stop.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    experts: Annotated[
        str | None, typer.Option(help="Routed models: experts to run, comma separated; none: no expert.")
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Models that mark: write the picture with the masks of the answer to --question here (PNG)."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Ask about pictures and videos. Inside: [bold]/image PATH[/] (or a pasted path or address) adds a picture to the next
    question, [bold]/video PATH[/] a video, [bold]/reset[/] starts anew, [bold]/quit[/] ends."""
    arguments.checkpoint(checkpoint)
    arguments.dtype(dtype)
    arguments.pictures(image)
    arguments.at_least(max_new_tokens, 1, "--max-new-tokens")
    arguments.at_least(temperature, 0, "--temperature")
    if overlay is not None and (question is None or len(image or []) != 1 or video):
        raise ConfigError("--overlay: give one picture with --image, and what to mark with --question")
    from transformers.utils import logging as transformers_logging

    from mllm.models.chat import ChatSession

    transformers_logging.disable_progress_bar()
    session = ChatSession.load(checkpoint, dtype=dtype)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "experts": experts.split(",") if experts else None,
    }
    for path in image or []:
        session.add_image(path)
    for path in video or []:
        session.add_video(path)
    if question is not None and overlay is not None:
        found, marked = session.mark(question, max_new_tokens=max_new_tokens)
        marked.save(overlay, "PNG")
        typer.echo(found.text)
        for number, box in enumerate(found.boxes(), 1):
            place = "nothing" if box is None else f"x {box[0]}, y {box[1]}, {box[2]} × {box[3]} pixels"
            typer.echo(f"mask {number}: {place}")
        if not len(found):
            typer.echo("no mask in the answer: nothing is marked")
        return
    if question is not None:
        typer.echo(session.ask(question, **options))
        return
    typer.echo(f"{checkpoint}: ready. /image PATH or address, /help, /quit")
    while True:
        try:
            line = typer.prompt("you", prompt_suffix="> ").strip()
        except (typer.Abort, EOFError):
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            session.reset()
        elif line == "/help":
            typer.echo(_HELP)
        elif line.startswith("/video ") or _picture_of(line):
            film = line.startswith("/video ")
            place = line.removeprefix("/video ").strip().strip("'\"") if film else _picture_of(line)
            try:
                (session.add_video if film else session.add_image)(place)
                typer.echo(f"+ {place}")
            except ValueError as error:
                typer.echo(f"! {error}")
        elif line == "/video":
            typer.echo("! /video takes a file; /help says how")
        elif re.match(r"/[a-z]+$", line):
            typer.echo(f"! no command {line}{did_you_mean(line, _COMMANDS)}; /help shows them")
        elif line:
            try:
                session.stream(line, lambda text: typer.echo(text, nl=False), **options)
                typer.echo("")
            except (MllmError, ValueError) as error:
                typer.echo(f"! {error}")


_COMMANDS = ("/image", "/video", "/reset", "/help", "/quit", "/exit")
_HELP = """/image PATH   a picture for the next question: a file or an address; a pasted path or address alone does the same
/video PATH   a video: a file or a folder of frames
/reset        start anew, without the conversation and its pictures
/help         this
/quit         end (so do /exit and Ctrl-D)
Anything else is a question. Pictures stay in the conversation until /reset."""


def _picture_of(line: str) -> str | None:
    """The file or address that a line adds: after ``/image``, or pasted alone; None for a question."""
    is_command = line.startswith("/image ") or line == "/image"
    place = line.removeprefix("/image").strip().strip("'\"") if is_command else line.strip("'\"")
    if is_command:
        return place or "/image (no file given)"
    if place.startswith(("http://", "https://")) and " " not in place:
        return place
    try:
        return place if Path(place).is_file() else None
    except OSError:  # a question longer than a path may be
        return None


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(chat)
