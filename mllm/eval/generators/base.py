"""What does the harness need from whatever generates text?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mllm.errors import AlignmentError
from mllm.types import IMAGE_MARK, Request, Response, Turn


@dataclass(frozen=True)
class GeneratorSettings:
    """What the user says about generation, whoever generates. device: None, the generator's own choice; base_url,
    concurrency: for generators that ask a server; picture_cache: MiB for visual tokens of pictures that are asked about again, in
    this task or another (hf)."""

    batch_size: int = 8
    dtype: str = "float32"
    device: str | None = None
    base_url: str | None = None
    concurrency: int = 8
    picture_cache: int = 1024


@runtime_checkable
class Generator(Protocol):
    """Answers requests, in any order, each exactly once. Knows nothing of tasks.

    A request that cannot be answered gives a `Response` with ``error``; it never stops the others. A class registered in
    `GENERATORS` also has ``open(checkpoint, settings)``, a class method that makes one for a checkpoint folder, hub id or
    model's name (`GeneratorSettings`).
    """

    name: str

    def fingerprint(self) -> str:
        """What an answer depends on besides the request: weights, precision, code path. Part of the cache key."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        """Stream of answers. Takes requests as it goes, so a long run never holds all images at once."""
        ...


def check_marks(request: Request) -> None:
    """Raise `AlignmentError` for a request with more or fewer places of pictures than pictures."""
    marks = sum(turn.content.count(IMAGE_MARK) for turn in request.turns)
    if marks != len(request.images):
        raise AlignmentError(f"request {request.id}: {marks} image places and {len(request.images)} images")


def hf_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as Hugging Face chat messages: content split into text and ``{"type": "image"}`` parts."""
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for position, text in enumerate(turn.content.split(IMAGE_MARK)):
            if position:
                parts.append({"type": "image"})
            if text.strip("\n") or (text and not parts):
                parts.append({"type": "text", "text": text.lstrip("\n") if position else text})
        messages.append({"role": turn.role, "content": parts or [{"type": "text", "text": ""}]})
    return messages


def cut_at_stops(text: str, stops: Sequence[str] | None) -> str:
    """``text`` before the first of ``stops``."""
    ends = [place for stop in stops or () if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def answer_text(reply: str) -> str:
    """A decoded reply without the white space around it: templates that separate the answer by a space make models begin
    with one (``ASSISTANT: yes``), which belongs to the template, and rules that compare raw strings would count it."""
    return reply.strip()


def checkpoint_hash(checkpoint: str) -> str:
    """Sixteen hex digits over the files of a checkpoint folder, its diffusion decoder's among them; a hub id stays what it is."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    from mllm.visual_tokenizers.diffusion.carried import FOLDER

    digest = hashlib.sha256()
    carried = (
        folder / FOLDER
    )  # what it draws with; other folders (optimizer state, parts of a run) are no part of the model
    for path in [*sorted(folder.iterdir()), *(sorted(carried.iterdir()) if carried.is_dir() else [])]:
        if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]
