"""Are these the same captioned pictures that others were asked about? As `mllm.data.charts.frozen`, for `mllm data build captions`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from mllm import assets
from mllm.config import StrictModel, read_yaml, validate
from mllm.data.captioned import build_captioned
from mllm.errors import ConfigError, DataError

QUESTIONS = "test.jsonl"


class FrozenCaptions(StrictModel):
    """What is built from which folder, and what comes out."""

    builder: Literal["captions"]
    description: str
    source: str
    """Folder of pictures with a text beside each, where its package puts it."""
    package: str = ""
    """Where the folder comes from, and its version when this was frozen."""
    settings: dict[str, int]
    """Of `build_captioned`."""
    num_questions: int
    questions: str
    """sha256 of ``test.jsonl``: ids, options, answers."""
    pictures: str
    """sha256 over the test pictures' pixels, in the order of their names."""


def is_of_captions(name: str) -> bool:
    """Whether a frozen benchmark (data/frozen, or a path) is of captioned pictures."""
    data = read_yaml(assets.find("data/frozen", name, kind="frozen benchmark"))
    return isinstance(data, dict) and data.get("builder") == "captions"


def load_frozen_captions(name: str) -> FrozenCaptions:
    """A frozen benchmark of captioned pictures by name or path. Raises `ConfigError`."""
    path = assets.find("data/frozen", name, kind="frozen benchmark")
    return validate(FrozenCaptions, read_yaml(path), where=path.name)


def rebuild_captions(name: str, output: Path, *, source: Path | None = None) -> tuple[FrozenCaptions, list[str]]:
    """Build it again: the manifest, and what differs in the pictures. source: the folder, where it is not the manifest's own.

    Raises `ConfigError` where the folder is not there, and `DataError` where the questions are others.
    """
    frozen = load_frozen_captions(name)
    folder = source or Path(frozen.source)
    if not folder.is_dir():
        hint = f"it comes with {frozen.package}; " if frozen.package else ""
        raise ConfigError(f"{folder}: no such folder; {hint}--source names another place")
    build_captioned(folder, output, **frozen.settings)
    found = describe_captions(output)
    if found["questions"] != frozen.questions:
        raise DataError(
            f"{output / QUESTIONS}: other questions than the frozen ones (sha256 {found['questions'][:12]}…, expected "
            f"{frozen.questions[:12]}…); the pictures or captions in {folder} differ from {frozen.package or 'those frozen'}"
        )
    same = found["pictures"] == frozen.pictures
    return frozen, [] if same else ["the same questions about other pixels (Pillow or the pictures differ)"]


def freeze_captions(folder: Path, path: Path, *, source: str, description: str, package: str = "") -> FrozenCaptions:
    """Write the manifest of a folder that `build_captioned` made from ``source`` to ``path``. Raises `DataError` without questions."""
    import yaml

    found = describe_captions(folder)
    if not found["num_questions"]:
        raise DataError(f"{folder}: holds no questions to freeze")
    settings = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]
    frozen = FrozenCaptions(
        builder="captions", description=description, source=source, package=package, settings=settings, **found
    )
    text = yaml.safe_dump(frozen.model_dump(), sort_keys=False, allow_unicode=True, width=140)
    path.write_text(text, encoding="utf-8")
    return frozen


def describe_captions(folder: Path) -> dict[str, Any]:
    """What is compared, of a folder."""
    import numpy as np
    from PIL import Image

    text = (folder / QUESTIONS).read_bytes()
    digest = hashlib.sha256()
    for path in sorted((folder / "test").glob("*.png")):
        with Image.open(path) as picture:
            digest.update(f"{path.name} {picture.size}".encode() + np.asarray(picture.convert("RGB")).tobytes())
    return {
        "num_questions": len(text.splitlines()),
        "questions": hashlib.sha256(text).hexdigest(),
        "pictures": digest.hexdigest(),
    }
