"""Were benchmark pictures or questions seen in training?"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import DataError
from mllm.eval.data.loading import TaskData
from mllm.eval.data.pictures import Picture
from mllm.eval.metrics import build_metric
from mllm.eval.predictions import iterate_predictions
from mllm.eval.report.columns import ScoredItems, Taken, scored

_SIDE = 32
_LOW = 8
_FLAT = 1.0
"""Standard deviation of gray levels (of 255) below which a picture counts as one colour."""


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


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits that survive resizing, recompression and small colour changes: signs of the low 8 × 8 cosine
    coefficients of a 32 × 32 gray copy against their median. None for a picture of (nearly) one colour."""
    pixels = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    if pixels.std() < _FLAT:
        return None
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


class OverlapFinder:
    """Collects, for several benchmarks at once, the nearest training sample to each benchmark sample.

    max_distance: hash bits that may differ. A question counts as seen when at least ``min_share`` of its n-grams
    occur in one training text; questions shorter than half an n-gram ("What is this?") are not evidence and are left
    out, as are pictures of (nearly) one colour, whose hashes say nothing.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        *,
        max_distance: int = 4,
        ngram: int = 8,
        min_share: float = 0.5,
        images: bool = True,
    ):
        self.tasks, self.max_distance, self.ngram, self.min_share = list(tasks), max_distance, ngram, min_share
        self._best: dict[tuple[int, str, str], Overlap] = {}
        self._grams: dict[tuple[str, ...], list[tuple[int, str]]] = {}
        self._totals: dict[tuple[int, str], int] = {}
        hashes: list[int] = []
        self._owners: list[tuple[int, str]] = []
        for place, data in enumerate(self.tasks):
            for item in data.items:
                self._add_question(place, item.id, item.question)
            for owner, value in _benchmark_hashes(data) if images else ():
                hashes.append(value)
                self._owners.append((place, owner))
        self._hashes = np.array(hashes, np.uint64)
        self._sizes = {len(gram) for gram in self._grams}

    @property
    def wants_pictures(self) -> bool:
        """Whether training pictures are worth hashing."""
        return bool(self._owners)

    def _add_question(self, place: int, name: str, question: str) -> None:
        found = text_ngrams(question, self.ngram)
        if len(re.findall(r"\w+", question)) * 2 >= self.ngram:
            self._totals[place, name] = len(found)
            for gram in found:
                self._grams.setdefault(gram, []).append((place, name))

    def meet(self, name: str, text: str, hashes: Iterable[int | None]) -> None:
        """One training sample: its id, what users and system said, the `perceptual_hash` of its pictures."""
        seen: dict[tuple[int, str], int] = {}
        for gram in {gram for size in self._sizes for gram in text_ngrams(text, size) if gram in self._grams}:
            for owner in self._grams[gram]:
                seen[owner] = seen.get(owner, 0) + 1
        for (place, owner), count in seen.items():
            share = count / self._totals[place, owner]
            if share >= self.min_share:
                self._keep(place, Overlap(owner, "text", name, share), -share)
        for value in hashes if self.wants_pictures else ():
            if value is None:
                continue
            distances = np.bitwise_count(self._hashes ^ np.uint64(value))
            for position in np.flatnonzero(distances <= self.max_distance):
                place, owner = self._owners[position]
                distance = float(distances[position])
                self._keep(place, Overlap(owner, "image", name, distance), distance)

    def _keep(self, place: int, found: Overlap, badness: float) -> None:
        key = (place, found.id, found.kind)
        before = self._best.get(key)
        if before is None or badness < (before.measure if found.kind == "image" else -before.measure):
            self._best[key] = found

    def overlaps(self) -> dict[str, list[Overlap]]:
        """Task → overlaps, in the benchmark's order."""
        result = {}
        for place, data in enumerate(self.tasks):
            order = {item.id: k for k, item in enumerate(data.items)}
            mine = [overlap for (task, _, _), overlap in self._best.items() if task == place]
            result[data.task.name] = sorted(mine, key=lambda overlap: (order[overlap.id], overlap.kind))
        return result


def find_overlaps(
    data: TaskData,
    training: Iterable[tuple[str, str, Sequence[Any]]],
    *,
    max_distance: int = 4,
    ngram: int = 8,
    min_share: float = 0.5,
    images: bool = True,
) -> list[Overlap]:
    """Samples of one benchmark that training samples repeat, each with the nearest one found. training: ``(id, text,
    images)`` triples, streamed; an image is anything `mllm.processing.images.load_image` takes. The limits are
    `OverlapFinder`'s."""
    finder = OverlapFinder([data], max_distance=max_distance, ngram=ngram, min_share=min_share, images=images)
    for name, text, pictures in training:
        finder.meet(name, text, picture_hashes(name, pictures) if finder.wants_pictures else ())
    return finder.overlaps()[data.task.name]


def picture_hashes(name: str, pictures: Sequence[Any]) -> list[int | None]:
    """Hashes of a training sample's pictures. Raises `DataError` for one that cannot be read."""
    from mllm.processing.images import load_image

    return [
        perceptual_hash(load_image(source, where=f"training sample {name}, image {position}"))
        for position, source in enumerate(pictures)
    ]


def _benchmark_hashes(data: TaskData) -> Iterator[tuple[str, int]]:
    """(id, hash) of every picture that has one; each file is read once."""
    known: dict[Any, int | None] = {}
    for item in data.items:
        for source in item.pictures:
            if not isinstance(source, Picture):
                continue
            key = source.source
            if key not in known:
                try:
                    known[key] = perceptual_hash(source.load()[0])
                except DataError:
                    known[key] = None  # the run names it
            value = known[key]
            if value is not None:
                yield item.id, value


def training_samples(samples: Iterable[Any]) -> Iterator[tuple[str, str, Sequence[Any]]]:
    """`Sample` objects as the triples that `find_overlaps` takes; the text is what users and system said."""
    for sample in samples:
        yield sample.id, " ".join(turn.content for turn in sample.turns if turn.role != "assistant"), sample.images


def scores_without(
    path: str | Path, overlaps: Sequence[Overlap] | Set[str], metrics: Sequence[str | Mapping[str, Any]]
) -> list[CleanScore]:
    """Headlines of a prediction file with and without the overlapping samples (or those of the given ids)."""
    met = overlaps if isinstance(overlaps, Set) else {overlap.id for overlap in overlaps}
    results = []
    for entry in metrics:
        metric = build_metric(entry)
        items, there = ScoredItems(), array("b")
        for row in iterate_predictions(Path(path)):
            if (facts := scored(row, metric)) is not None:
                items.append(row["id"], facts)
                there.append(row["id"] in met)
        if not items:
            raise DataError(f"{path}: no sample is scored by {metric.label}; rescore it first")
        overlapping = np.frombuffer(there, dtype=bool)
        parts = items, Taken(items, np.flatnonzero(~overlapping)), Taken(items, np.flatnonzero(overlapping))
        totals = [metric.aggregate(part)["score"] if part else float("nan") for part in parts]
        results.append(CleanScore(metric.label, *totals, num_samples=len(items), num_overlapping=len(parts[2])))
    return results
