"""Does a dataset format keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mllm.config import validate
from mllm.data.sources import Source, open_source
from mllm.data.spec import SOURCES, DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.processing.images import load_image
from mllm.testing.running import run_checks
from mllm.types import IMAGE_MARK, Sample

_TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
_MESSAGES = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A square."}]
_ROWS: dict[str, dict[str, Any]] = {
    "llava": {"image": "0.png", "conversations": _TALK},
    "sharegpt": {"images": ["0.png"], "conversations": _TALK},
    "messages": {"images": ["0.png"], "messages": _MESSAGES},
    "columns": {"image": "0.png", "question": "What is it?", "answer": "A square."},
}


def _shipped(name: str, folder: Path) -> dict[str, Any]:
    """A small dataset of one of our own formats."""
    from PIL import Image

    Image.new("RGB", (20, 16), (200, 30, 30)).save(folder / "0.png")
    rows = [{"id": str(k), **_ROWS[name]} for k in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"columns": {"question": "question", "answer": "answer", "image": "image"}} if name == "columns" else {}
    return {"format": name, "path": str(folder / "rows.jsonl"), **columns}


def _open(spec: Mapping[str, Any]) -> Source:
    return open_source(validate(DatasetSpec, {"name": "example", **spec}, where="tiny"))


def check_rows(spec: Mapping[str, Any]) -> None:
    """There are rows; a row number decides the sample; numbers outside are an IndexError, as loops need."""
    source = _open(spec)
    assert len(source) > 0, "tiny() makes a dataset without rows"
    for number in range(len(source)):
        one, two = source[number], source[number]
        assert isinstance(one, Sample), f"row {number} is {type(one).__name__}, expected a Sample"
        assert (one.id, one.turns) == (two.id, two.turns), f"row {number} is another sample when it is read again"
        assert one.turns == _open(spec)[number].turns, (
            f"row {number} is another sample when the dataset is opened again"
        )
    for outside in (len(source), -1):
        try:
            source[outside]
        except IndexError:
            continue
        raise AssertionError(f"row {outside} of {len(source)} is no IndexError")


def check_samples(spec: Mapping[str, Any]) -> None:
    """Known roles, text as strings, as many marks as pictures, something to learn, a string as id."""
    for sample in _open(spec):
        assert isinstance(sample.id, str) and sample.id, f"id is {sample.id!r}, expected a string"
        roles = [turn.role for turn in sample.turns]
        assert roles and set(roles) <= {"system", "user", "assistant"}, f"sample {sample.id}: roles {roles}"
        assert "assistant" in roles, f"sample {sample.id}: no assistant turn, so nothing is learned"
        assert all(isinstance(turn.content, str) for turn in sample.turns), (
            f"sample {sample.id}: a turn's content is no string"
        )
        marks = sum(turn.content.count(IMAGE_MARK) for turn in sample.turns)
        assert marks == len(sample.images), f"sample {sample.id}: {marks} image marks and {len(sample.images)} images"


def check_pictures(spec: Mapping[str, Any]) -> None:
    """Every picture opens where the sample says it is."""
    for sample in _open(spec):
        for image in sample.images:
            try:
                load_image(image, where=f"sample {sample.id}")
            except DataError as error:
                raise AssertionError(f"a picture does not open: {error}") from error


def check_fingerprint(spec: Mapping[str, Any]) -> None:
    """The rows have a fingerprint, the same when opened again: resuming and quarantine lists depend on it."""
    one, two = _open(spec).fingerprint, _open(spec).fingerprint
    assert isinstance(one, str), f"fingerprint is {type(one).__name__}, expected a string"
    assert one == two, "the fingerprint changes although the rows do not"


CHECKS: tuple[Callable[[Mapping[str, Any]], None], ...] = (check_rows, check_samples, check_pictures, check_fingerprint)


def check_format(name: str) -> list[str]:
    """Run every check on the dataset format registered under ``name``; returns the checks' names.

    The class makes its own example with ``tiny(folder)``: it writes a small dataset there and returns its declaration.
    Raises `AssertionError` naming the check and what broke, `UnknownName`, or `ConfigError` without an example.
    """
    cls: Any = SOURCES.get(name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if hasattr(cls, "tiny"):
            spec = {"format": name, **cls.tiny(folder)}
        elif name in _ROWS:
            spec = _shipped(name, folder)
        else:
            raise ConfigError(
                f"format {name!r}: {cls.__name__} needs a class method tiny(folder) that writes a small dataset and returns its "
                "declaration, such as {'path': str(folder / 'rows.jsonl')}"
            )
        return run_checks(CHECKS, spec)
