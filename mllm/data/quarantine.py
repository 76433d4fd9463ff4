"""Which rows did a check find bad, and does that still hold for the files as they are now?"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mllm.data.sources import Source
from mllm.errors import AlignmentError, DataError
from mllm.processing.images import image_size
from mllm.processing.mask_files import read_mask
from mllm.processing.visual_hash import visual_hash
from mllm.types import Sample, Video

IMAGE_KINDS = ("missing image", "corrupt image")
ROW_KINDS = ("unreadable", "placeholders", "no labels", "masks")


class Entry(NamedTuple):
    """One row of a list. image, content: which of its pictures is at fault, and that file's hash (None: there was none)."""

    row: int
    id: str
    kind: str | None
    reason: str
    image: int | None = None
    content: str | None = None


@dataclass
class Quarantine:
    """A dataset's list as far as it holds. rows: row → reason; stale: rows whose files are others than those that were
    judged: they are trained on again."""

    path: Path
    rows: dict[int, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    stale: list[int] = field(default_factory=list)

    def describe(self, name: str, total: int) -> str | None:
        """What training says about it; None where there is no list."""
        if not self.rows and not self.stale:
            return None
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        text = f"{name}: {len(self.rows):,} of {total:,} rows are left out by {self.path}"
        text += f" ({kinds})" if kinds else ""
        if self.stale:
            text += (
                f"; {len(self.stale):,} rows on that list are trained on again, for their files have changed since (run "
                "mllm data check --write-quarantine to renew it)"
            )
        return text

    def record(self) -> dict[str, Any]:
        """The same for ``run.json``."""
        return {"list": str(self.path), "rows": len(self.rows), "kinds": dict(self.kinds), "stale": len(self.stale)}

    def digest(self) -> str:
        """Changes when other rows are left out; empty when none is."""
        if not self.rows:
            return ""
        return hashlib.sha256(json.dumps(sorted(self.rows)).encode()).hexdigest()[:16]


def has_labels(sample: Sample) -> bool:
    """Whether some assistant turn is to be learned."""
    taught = (turn for turn in sample.turns if turn.role == "assistant" and turn.learn)
    return any(turn.content.strip() or turn.calls or turn.thoughts for turn in taught)


def content_of(image: Any) -> str | None:
    """The hash of a picture's file as it is now; None when there is none to read."""
    try:
        return visual_hash(image)
    except DataError:
        return None


def read_quarantine(source: Source, path: Path | None = None) -> Quarantine:
    """The rows of a dataset's list that are still bad; an empty one when there is no list.

    An entry is tied to what it judged: a row's text (the dataset's fingerprint), a picture's content. A picture that has
    arrived or was mended since, or a row that reads now, is no longer left out. Entries without a kind were written by
    hand and hold. Raises `DataError` when the list was made for other rows (its row numbers would hit innocent samples).
    """
    path = path or source.quarantine_path()
    result = Quarantine(path)
    if not path.is_file():
        return result
    for entry in _entries(source, path):
        if entry.row < len(source) and not _holds(source, entry):
            result.stale.append(entry.row)
        else:
            result.rows[entry.row] = entry.reason
            result.kinds[entry.kind or "by hand"] += 1
    return result


def write_quarantine(path: Path, header: Mapping[str, Any], entries: Iterable[Entry]) -> None:
    """Replace a list by these entries. Raises `DataError` when it cannot be written."""
    lines = [header, *(entry._asdict() for entry in entries)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(path.name + ".tmp")
        partial_file.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
        partial_file.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: the quarantine list cannot be written ({error.strerror}); name another place for it"
        ) from None


def _entries(source: Source, path: Path) -> list[Entry]:
    found: list[Entry] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if "row" in entry:
                    found.append(
                        Entry(
                            int(entry["row"]), str(entry.get("id", entry["row"])), entry.get("kind"),
                            str(entry.get("reason", "")), entry.get("image"), entry.get("content"),
                        )
                    )  # fmt: skip
                elif entry["fingerprint"] != source.fingerprint:
                    raise DataError(
                        f"{path} was made for another version of {source.name} ({entry.get('rows')} rows then, "
                        f"{len(source)} now); run `mllm data check --write-quarantine` again or delete it"
                    )
            except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{path}, line {number}: not an entry of a quarantine list ({error!r})") from None
    return found


def _holds(source: Source, entry: Entry) -> bool:
    if entry.kind not in (*IMAGE_KINDS, *ROW_KINDS):
        return True
    try:
        sample = source[entry.row]
    except (DataError, AlignmentError):
        return True
    if entry.kind == "no labels":
        return not has_labels(sample)
    if entry.kind == "masks":
        return bad_mask(sample, where=source.where(entry.row, sample.id)) is not None
    if entry.kind in ROW_KINDS:  # it reads now
        return False
    return _same_pictures(sample.images, entry)


def bad_mask(sample: Sample, *, where: str) -> str | None:
    """What is wrong with the first mask of a sample that cannot be read or has the size of none of its pictures; None where all are
    well. Which picture a mask belongs to is for the model's own tokens to say."""
    if not sample.masks:
        return None
    try:
        sizes = sorted(
            {image_size(picture, where=where) for picture in sample.images if not isinstance(picture, Video)}
        )
        for number, entry in enumerate(sample.masks):
            for place, size in enumerate(sizes):
                try:
                    read_mask(entry, size, where=f"{where}, mask {number}")
                    break
                except DataError:
                    if place == len(sizes) - 1:
                        raise
    except DataError as error:
        return str(error)
    return None


def _same_pictures(images: Sequence[Any], entry: Entry) -> bool:
    if entry.image is None:  # written before contents were: only what is still missing is known to be as it was
        return any(content_of(image) is None for image in images)
    return entry.image < len(images) and content_of(images[entry.image]) == entry.content
