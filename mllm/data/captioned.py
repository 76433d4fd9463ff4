"""How do pictures with a text file beside each become training captions and a multiple-choice test on captions never trained on?"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.data.conversations import picture_messages
from mllm.errors import ConfigError, DataError
from mllm.pictures import load_image, upright

REQUEST = "What is in the picture?"
QUESTION = "Which of these is in the picture?"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".svg")
LETTERS = "ABCDEFGH"
_LONGEST = 200


@dataclass(frozen=True)
class Captioned:
    """A picture, its caption, and the folder below the root that it lies in."""

    path: Path
    name: str
    caption: str
    category: str


def build_captioned(
    root: Path, output: Path, *, num_test: int = 150, num_options: int = 4, size: int = 448, seed: int = 0
) -> dict[str, Any]:
    """Write ``train.jsonl`` (a conversation a picture), ``test.jsonl`` (one question with ``num_options`` captions, of the same folder
    where there are so many), square RGB pictures on white, and ``manifest.json``, which is returned.

    The caption is the first line of the file of the same name and the suffix ``.txt``. A caption stands on one side only, however many
    pictures share it; the other options are captions of the test. Pictures that cannot be used are counted with the reason. Raises
    `ConfigError` for a folder without captioned pictures and for one that holds fewer captions than are asked for.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; expected one of pictures with a text file beside each")
    found, skipped = find_captioned(root)
    captions = sorted(
        {one.caption for one in found}, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest()
    )
    if not 2 <= num_options <= len(LETTERS):
        raise ConfigError(f"options is {num_options}; expected 2 to {len(LETTERS)}")
    if len(captions) < max(num_test + 1, num_options):
        reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common(3)) or "nothing was skipped"
        raise ConfigError(
            f"{root}: {len(captions)} captions, and {num_test} are to be kept for the test; give a folder with more ({reasons})"
        )
    for split in ("train", "test"):
        shutil.rmtree(output / split, ignore_errors=True)
        (output / split).mkdir(parents=True)
    kept = set(captions[:num_test])
    sides = {split: [one for one in found if (one.caption in kept) == (split == "test")] for split in ("train", "test")}
    sides["test"] = list({one.caption: one for one in sides["test"]}.values())
    drawn: dict[str, list[tuple[Captioned, str]]] = {}
    for split, members in sides.items():
        drawn[split] = []
        for number, one in enumerate(members):
            name = f"{split}/{number:05d}.png"
            try:
                picture = on_white(one.path, size)
            except DataError as error:
                skipped[str(error)] += 1
                continue
            picture.save(output / name)
            drawn[split].append((one, name))
    rows = {"train.jsonl": [_train_row(one, name) for one, name in drawn["train"]]}
    rows["test.jsonl"] = _test_rows(drawn["test"], num_options, random.Random(f"{seed}/test"))
    return _write(output, rows, skipped, {"num_test": num_test, "num_options": num_options, "size": size, "seed": seed})


def find_captioned(root: Path) -> tuple[list[Captioned], Counter[str]]:
    """Pictures with a caption, in order of their names, and how many others there are for which reason."""
    found, skipped = [], Counter()
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in PICTURES:
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            skipped["without a text file of the same name"] += 1
            continue
        lines = text.read_bytes().splitlines() or [b""]
        try:
            caption = " ".join(lines[0].decode("utf-8").split())
        except UnicodeDecodeError:
            skipped["with a caption that is no UTF-8"] += 1
            continue
        if path.suffix.lower() == ".svg":
            skipped["drawn as SVG, which is not read here"] += 1
        elif not caption:
            skipped["with an empty caption"] += 1
        elif len(caption) > _LONGEST:
            skipped[f"with a caption of more than {_LONGEST} characters"] += 1
        else:
            inner = path.relative_to(root)
            found.append(
                Captioned(path, inner.as_posix(), caption, inner.parts[0] if len(inner.parts) > 1 else root.name)
            )
    return found, skipped


def on_white(path: Path, size: int) -> Image.Image:
    """The whole picture in the middle of a white square, as large as it goes. Raises `DataError` for what is no picture and for
    one that shows nothing on white."""
    try:
        with Image.open(path) as opened:
            if opened.has_transparency_data:  # laid on white below, at the size that it has there
                picture = upright(opened).convert("RGBA")
            else:
                picture = load_image(path, where=path.name).convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError, DataError) as error:
        raise DataError(f"that cannot be read ({type(error).__name__})") from None
    scale = size / max(picture.size)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(shape, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(picture, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    result = square.convert("RGB")
    if all(low == high for low, high in result.getextrema()):  # type: ignore[misc]
        raise DataError("that shows nothing on white")
    return result


def _train_row(one: Captioned, name: str) -> dict[str, Any]:
    return {"id": one.name, "messages": picture_messages(name, [(REQUEST, one.caption)]), "category": one.category}


def _test_rows(members: Sequence[tuple[Captioned, str]], num_options: int, rng: random.Random) -> list[dict[str, Any]]:
    """One question a picture; right answers stand on every letter alike."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for one, _ in members:
        by_category[one.category].append(one.caption)
    everywhere = [one.caption for one, _ in members]
    letters = [LETTERS[k % num_options] for k in range(len(members))]
    rng.shuffle(letters)
    rows = []
    for (one, name), letter in zip(members, letters):
        near = [caption for caption in by_category[one.category] if caption != one.caption]
        far = [caption for caption in everywhere if caption != one.caption and caption not in near]
        rng.shuffle(near)
        rng.shuffle(far)
        options = (near + far)[: num_options - 1]
        options.insert(LETTERS.index(letter), one.caption)
        rows.append(
            {
                "id": one.name, "image": name, "question": QUESTION, "options": options, "answer": letter,
                "caption": one.caption, "category": one.category,
            }
        )  # fmt: skip
    return rows


def _write(output: Path, rows: dict[str, list[dict[str, Any]]], skipped: Counter[str], settings: Any) -> dict[str, Any]:
    files = {}
    for name, content in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (output / name).write_text(text, encoding="utf-8")
        files[name] = {"rows": len(content), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest = {"settings": settings, "files": files, "skipped": dict(skipped.most_common())}
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest
