"""Were benchmark pictures or questions seen in training?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import DataError
from mllm.eval.loading import TaskData
from mllm.eval.metrics import build_metric
from mllm.eval.pictures import Picture
from mllm.eval.predictions import read_predictions
from mllm.eval.results import scored_items

_SIDE = 32
_LOW = 8


@dataclass(frozen=True)
class Overlap:
    """A benchmark sample and the training sample it meets. kind: ``image`` (distance in differing hash bits of 64) or
    ``text`` (share of its n-grams seen)."""

    id: str
    kind: str
    training_id: str
    measure: float


@dataclass(frozen=True)
class CleanScore:
    """One metric's headline with all samples, without the overlapping ones, and on those alone."""

    metric: str
    all_samples: float
    without: float
    only: float
    num_samples: int
    num_overlapping: int


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that survive resizing, recompression and small colour changes: signs of the low 8 × 8 cosine
    coefficients of a 32 × 32 gray copy against their median."""
    pixels = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    angles = np.pi * (np.arange(_SIDE) + 0.5)[None] * np.arange(_LOW)[:, None] / _SIDE
    basis = np.cos(angles)
    low = (basis @ pixels @ basis.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean brightness says nothing
    return int("".join("1" if bit else "0" for bit in bits), 2)


def text_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Runs of ``n`` words, lower case, without punctuation; a shorter text is one run of all its words."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < n:
        return {tuple(words)} if words else set()
    return {tuple(words[k : k + n]) for k in range(len(words) - n + 1)}


def find_overlaps(
    data: TaskData,
    training: Iterable[tuple[str, str, Sequence[Any]]],
    *,
    max_distance: int = 4,
    ngram: int = 8,
    min_share: float = 0.5,
    images: bool = True,
) -> list[Overlap]:
    """Benchmark samples that training samples repeat, each with the nearest one found.

    training: ``(id, text, images)`` triples, streamed; an image is anything `mllm.processing.images.load_image` takes.
    max_distance: hash bits that may differ. A question counts as seen when at least ``min_share`` of its n-grams
    occur in one training text; questions shorter than half an n-gram ("What is this?") are not evidence and are left
    out.
    """
    from mllm.processing.images import load_image

    hashes, owners = _benchmark_hashes(data) if images else (np.empty(0, np.uint64), [])
    grams: dict[tuple[str, ...], list[str]] = {}
    totals: dict[str, int] = {}
    for item in data.items:
        found = text_ngrams(item.question, ngram)
        if len(re.findall(r"\w+", item.question)) * 2 >= ngram:
            totals[item.id] = len(found)
            for gram in found:
                grams.setdefault(gram, []).append(item.id)
    sizes = {len(gram) for gram in grams}
    best: dict[tuple[str, str], Overlap] = {}
    for name, text, pictures in training:
        seen: dict[str, int] = {}
        for gram in {gram for size in sizes for gram in text_ngrams(text, size) if gram in grams}:
            for owner in grams[gram]:
                seen[owner] = seen.get(owner, 0) + 1
        for owner, count in seen.items():
            _keep(best, Overlap(owner, "text", name, count / totals[owner]), larger=True, limit=min_share)
        for position, source in enumerate(pictures if len(owners) else ()):
            value = perceptual_hash(load_image(source, where=f"training sample {name}, image {position}"))
            distances = np.bitwise_count(hashes ^ np.uint64(value))
            for place in np.flatnonzero(distances <= max_distance):
                _keep(
                    best,
                    Overlap(owners[place], "image", name, float(distances[place])),
                    larger=False,
                    limit=max_distance,
                )
    order = {item.id: k for k, item in enumerate(data.items)}
    return sorted(best.values(), key=lambda overlap: (order[overlap.id], overlap.kind))


def _benchmark_hashes(data: TaskData) -> tuple[np.ndarray, list[str]]:
    values, owners = [], []
    for item in data.items:
        for source in item.pictures:
            if isinstance(source, Picture):
                try:
                    image, _ = source.load()
                except DataError:
                    continue  # the run names it
                values.append(perceptual_hash(image))
                owners.append(item.id)
    return np.array(values, np.uint64), owners


def _keep(best: dict[tuple[str, str], Overlap], found: Overlap, *, larger: bool, limit: float) -> None:
    good = found.measure >= limit if larger else found.measure <= limit
    before = best.get((found.id, found.kind))
    if good and (before is None or (found.measure > before.measure if larger else found.measure < before.measure)):
        best[found.id, found.kind] = found


def training_samples(samples: Iterable[Any]) -> Iterator[tuple[str, str, Sequence[Any]]]:
    """`Sample` objects as the triples that `find_overlaps` takes; the text is what users and system said."""
    for sample in samples:
        yield sample.id, " ".join(turn.content for turn in sample.turns if turn.role != "assistant"), sample.images


def scores_without(
    path: str | Path, overlaps: Sequence[Overlap], metrics: Sequence[str | Mapping[str, Any]]
) -> list[CleanScore]:
    """Headlines of a prediction file with and without the overlapping samples."""
    rows = read_predictions(Path(path))
    met = {overlap.id for overlap in overlaps}
    results = []
    for entry in metrics:
        metric = build_metric(entry)
        items, _ = scored_items(rows, metric)
        if not items:
            raise DataError(f"{path}: no sample is scored by {metric.label}; rescore it first")
        parts = items, [item for item in items if item.id not in met], [item for item in items if item.id in met]
        totals = [metric.aggregate(part)["score"] for part in parts]
        results.append(CleanScore(metric.label, *totals, num_samples=len(items), num_overlapping=len(parts[2])))
    return results
