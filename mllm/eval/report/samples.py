"""Which samples does the report list, by what can one filter them, and how does one look?"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.eval.report.facts import refused
from mllm.eval.report.results import Row, TaskResult, disagree

LISTED = 2000
"""Samples of a task under one filter; all are in the prediction file."""
FILTERS = {
    "wrong": "wrong", "right": "right", "unparsed": "unparsed", "declined": "declined", "disagree": "metrics disagree",
    "error": "failed",
}  # fmt: skip
"""Filter → the word on its button."""
_UNJUDGED = ""


@dataclass
class Listing:
    """A task's samples for the report, read in one pass. counts: of every filter over all samples; rows: those that are listed, each
    with the filters it comes under; blind: their blind answers by id."""

    total: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILTERS, 0))
    rows: list[tuple[Row, list[str]]] = field(default_factory=list)
    blind: dict[str, str] = field(default_factory=dict)

    def under(self, name: str) -> list[tuple[Row, list[str]]]:
        """The listed rows under one filter."""
        return [(row, flags) for row, flags in self.rows if name in flags]


def list_samples(result: TaskResult, rows: Iterable[Row], blind: Iterable[Row], thumbnails: Path) -> Listing:
    """The first `LISTED` samples under every filter, those whose small pictures are kept first. rows and blind are read once, as
    they come from a file of any length."""
    labels = [metric.label for metric in result.metrics]
    pairs = disagreeing(result)
    found, kept = Listing(), dict.fromkeys([*FILTERS, _UNJUDGED], 0)
    without: list[tuple[Row, list[str]]] = []
    for row in rows:
        found.total += 1
        flags = flags_of(row, labels, pairs)
        names = [name for name in flags if name in FILTERS]
        for name in names:
            found.counts[name] += 1
        names = names or [_UNJUDGED]
        if all(kept[name] >= LISTED for name in names):
            continue
        seen = all(_small(thumbnails, digest).is_file() for digest in row["images"][:4])
        if not seen and len(without) >= LISTED:
            continue
        (found.rows if seen else without).append((row, flags))
        if seen:
            for name in names:
                kept[name] += 1
    found.rows += without[: max(0, LISTED - len(found.rows))]
    wanted = {row["id"] for row, _ in found.rows}
    found.blind = {row["id"]: row["output"] for row in blind if row["id"] in wanted}
    return found


def disagreeing(result: TaskResult) -> list[str]:
    """Pairs of metrics, ``"A | B"``, that score some sample differently."""
    return [pair for pair, count in result.disagreements.items() if count]


def flags_of(row: Row, labels: Sequence[str], pairs: Sequence[str]) -> list[str]:
    """What a sample can be filtered by; ``d0``, ``d1`` …: the pairs of metrics that disagree on it."""
    scores = row.get("scores", {})
    headline = scores.get(labels[0])
    flags = []
    if headline is not None and "error" not in headline:
        flags.append("wrong" if (headline["value"] or 0) < 1 else "right")
    if any(entry.get("value") is None and "error" not in entry for entry in scores.values()):
        flags.append("unparsed")
    if not row.get("error") and not row.get("unusable") and refused(row):
        flags.append("declined")
    if disagree(row, labels):
        flags.append("disagree")
        flags += [f"d{k}" for k, pair in enumerate(pairs) if disagree(row, pair.split(" | "))]
    if row.get("error") or row.get("unusable"):
        flags.append("error")
    return flags


def sample_html(
    anchor: str, row: Row, flags: Sequence[str], labels: Sequence[str], blind: str | None, picture: Any
) -> str:
    """One sample. picture: digest → the element that shows it."""
    pictures = "".join(picture(digest) for digest in row["images"][:4])
    if len(row["images"]) > 4:
        pictures += f"<div class=none>and {len(row['images']) - 4} more</div>"
    lines = [f"<div class=q>{_text(row['question'])}</div>"]
    target = row["target"] if row["target"] is not None else "(none)"
    lines.append(f"<div><span class=k>target</span> {_text(target)}</div>")
    answer = row.get("error") or row.get("unusable") or _shown(row["output"])
    wrong = "w" if {"wrong", "error"} & set(flags) else "r"
    lines.append(f'<div><span class=k>answer</span> <span class="p {wrong}">{_text(answer)}</span></div>')
    if blind is not None:
        lines.append(f"<div><span class=k>blind answer</span> <span class=p>{_text(_shown(blind))}</span></div>")
    lines += [f"<div class=note>{line}</div>" for line in verdicts(row.get("scores", {}), labels)]
    category = f" · {row['category']}" if row.get("category") else ""
    lines.append(f"<div class=note>{_text(row['id'])}{_text(category)}</div>")
    body = f"<div>{pictures}</div><div>{''.join(lines)}</div>"
    return f'<div class=s data-t="{anchor}" data-f="{" ".join(flags)}">{body}</div>'


def verdicts(scores: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """What the metrics say of a sample, as HTML; metrics that say the same share a line."""
    verdicts: dict[str, list[str]] = {}
    for label in labels:
        entry = scores.get(label)
        if entry is None:
            continue
        value = entry.get("error") or ("unparsed" if entry["value"] is None else f"{entry['value']:.3g}")
        read = "" if "error" in entry else f" · read as <code>{_text(entry['extracted']) or 'nothing'}</code>"
        rule = "" if "error" in entry else f" · {_text(entry['rule'])}"
        verdicts.setdefault(f"{_text(value)}{read}{rule}", []).append(label)
    return [f"{_text(', '.join(names))}: {text}" for text, names in verdicts.items()]


def embedded(thumbnails: Path) -> Any:
    """Shows a picture from its bytes inside the page, which is then one file that can be sent."""

    def show(digest: str) -> str:
        path = _small(thumbnails, digest)
        if not path.is_file():
            return _ABSENT
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="" loading=lazy src="data:image/jpeg;base64,{data}">'

    return show


def linked(thumbnails: Path, prefix: str) -> Any:
    """Shows a picture from the folder beside the pages."""

    def show(digest: str) -> str:
        path = _small(thumbnails, digest)
        return f'<img alt="" loading=lazy src="{prefix}/{path.name}">' if path.is_file() else _ABSENT

    return show


_ABSENT = "<div class=none>no small copy kept</div>"


def _small(thumbnails: Path, digest: str) -> Path:
    return thumbnails / f"{digest[:24]}.jpg"


def _shown(text: str) -> str:
    """A reply as it is, in quotes when white space at its ends would not be seen."""
    return text if text and text == text.strip() else f"“{text}”"


def _text(value: Any) -> str:
    return html.escape(str(value))
