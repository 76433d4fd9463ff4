"""How are a task's questions put to a generator and its answers made into rows?"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mllm.errors import ConfigError, DataError
from mllm.eval.cache import AnswerCache, cache_key
from mllm.eval.data.loading import Item
from mllm.eval.data.pictures import Frames, Picture, blank
from mllm.eval.generators.base import Generator
from mllm.eval.ids import Places
from mllm.eval.metrics import Metric
from mllm.eval.predictions import Row
from mllm.eval.report.results import score_fields
from mllm.eval.task import TaskSpec
from mllm.types import IMAGE_MARK, Request, Response, Turn

Blind = Literal["gray", "none", "shuffled", "frames_frozen", "frames_shuffled", "frames_reversed"]
FRAMES: dict[Blind, Any] = {"frames_frozen": "frozen", "frames_shuffled": "shuffled", "frames_reversed": "reversed"}
"""Ways to ask about a video without its order, or with one frame of it, at the same number of tokens → `Video`'s ``play``."""


def times_asked(spec: TaskSpec, blind: bool) -> int:
    """How often every question of a task is asked: as it is, and of a blind run blanked, with another's pictures, and of videos as `FRAMES`
    show them."""
    return 1 if not blind else 3 + (0 if spec.frames is None else len(FRAMES))


_READERS = 4
_AHEAD = 256
_THUMB = 320
_HOPELESS = 8
"""A run whose first answers all fail stops there."""


@dataclass
class Loaded:
    """An item with its pixels. unusable: why it cannot be asked."""

    item: Item
    images: list[Any]
    hashes: list[str]
    unusable: str | None = None
    size: tuple[int, int] | None = None
    """Width and height of the first picture."""


def check_masks(generator: Generator, spec: TaskSpec) -> None:
    """Raise `ConfigError` for a task of masks and a generator that gives none."""
    if spec.generation.masks and not getattr(generator, "gives_masks", False):
        raise ConfigError(
            f"{spec.name}: its answers are masks, and {generator.name} gives none; evaluate a checkpoint with a segmentation head with "
            "--generator hf"
        )
    if spec.generation.edits and not getattr(generator, "gives_edits", False):
        raise ConfigError(
            f"{spec.name}: its answers are edited pictures, and {generator.name} gives none; evaluate a checkpoint with a "
            "segmentation head and one that draws with --generator hf"
        )


def answers(
    generator: Generator,
    spec: TaskSpec,
    items: Iterable[Item],
    metrics: Sequence[Metric],
    blind: Blind | None,
    cache: AnswerCache | None,
    folder: Path,
    keep: set[str],
) -> Iterator[Row]:
    """Rows as answers arrive, each item exactly once."""
    ready: list[Row] = []
    waiting: dict[str, tuple[Loaded, Request, str]] = {}
    fingerprint = generator.fingerprint()
    options = spec.generation.options()
    check_masks(generator, spec)

    def requests() -> Iterator[Request]:
        for loaded in load_items(items, blind, folder, keep, whole=getattr(generator, "takes_video", False)):
            item = loaded.item
            if loaded.unusable is not None:
                ready.append(_row(loaded, metrics, Response(item.id, ""), "", image_size=spec.image_size))
                continue
            turns = _without_images(item.turns) if blind == "none" else item.turns
            request = Request(item.id, turns, loaded.images, dict(options))
            key = cache_key(request, loaded.hashes, fingerprint)
            known = cache.get(key, request) if cache is not None else None
            if known is not None:
                ready.append(_row(loaded, metrics, known, key, image_size=spec.image_size))
                continue
            waiting[item.id] = (Loaded(item, [], loaded.hashes, size=loaded.size), request, key)
            yield request

    answered = failed = 0
    for response in generator.generate(requests()):
        answered, failed = answered + 1, failed + (response.error is not None)
        if failed == answered == _HOPELESS:
            raise DataError(f"{spec.name}: the first {failed} generations all failed, the last with: {response.error}")
        if response.id not in waiting:
            raise DataError(
                f"generator {generator.name} answered {response.id!r}, which was not asked or was answered before"
            )
        loaded, request, key = waiting.pop(response.id)
        request.images = []
        if cache is not None:
            cache.put(key, request, response)
        yield _row(loaded, metrics, response, key, image_size=spec.image_size)
        while ready:
            yield ready.pop(0)
    yield from ready
    if waiting:
        raise DataError(
            f"generator {generator.name} left {len(waiting)} requests without an answer: {', '.join(list(waiting)[:5])}"
        )


class SamePictures:
    """Whether a stored answer is to the pictures that its question has now, by their bytes. Videos, and blind runs that
    show no picture, are not compared. changed: ids of answers to other pictures."""

    def __init__(self, items: Sequence[Item], blind: Blind | None):
        self._items: Sequence[Item] = items if blind in (None, "shuffled") else []
        self._places: Places | None = None  # made when a run goes on
        self.changed: list[str] = []

    def __call__(self, row: Row) -> bool:
        if self._places is None:
            self._places = Places()
            for place, item in enumerate(self._items):
                self._places.add(item.id, place)
        found = (self._items[place] for place in self._places.of(row["id"]))
        item = next((item for item in found if item.id == row["id"]), None)
        if item is None or not all(isinstance(source, Picture) for source in item.pictures):
            return True
        try:
            now = [hashlib.sha256(source.read()).hexdigest() for source in item.pictures if isinstance(source, Picture)]
        except DataError:
            now = []
        if now == row.get("images"):
            return True
        if not row.get("unusable"):
            self.changed.append(row["id"])
        return False


def load_items(
    items: Iterable[Item],
    blind: Blind | None,
    folder: Path | None = None,
    keep: Collection[str] = (),
    *,
    whole: bool = False,
) -> Iterator[Loaded]:
    """Items with their pixels, read ahead in threads, in order; small copies of the pictures of those to ``keep``. whole: videos
    are left to the model, which chooses their frames; else the task's number of frames stand as pictures."""

    def load(item: Item) -> Loaded:
        loaded = _load_whole(item, blind) if whole and _holds_video(item) else _load(item, blind)
        if folder is not None and item.id in keep and loaded.unusable is None:
            _keep_thumbnails(folder, loaded)
        return loaded

    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[Loaded]] = deque()
        stream = iter(items)
        while True:
            while len(waiting) < _AHEAD and (item := next(stream, None)) is not None:
                waiting.append(pool.submit(load, item))
            if not waiting:
                return
            yield waiting.popleft().result()


def _load(item: Item, blind: Blind | None) -> Loaded:
    pairs: list[tuple[Any, str]] = []
    try:
        for source in item.pictures:
            pairs.extend([source.load()] if isinstance(source, Picture) else _played(source.load(), blind, item.id))
    except DataError as error:
        return Loaded(item, [], [], str(error))
    size = pairs[0][0].size if pairs else None
    images, hashes = [image for image, _ in pairs], [digest for _, digest in pairs]
    if blind == "none":
        images, hashes = [], []
    elif blind == "gray":
        images, hashes = [blank(image) for image in images], [f"gray {image.width}x{image.height}" for image in images]
    return Loaded(item, images, hashes, size=size)


def _play(blind: Blind | None) -> Any:
    """How a video is played in one way of asking."""
    return {"gray": "gray", **FRAMES}.get(blind or "", "forward")


def _holds_video(item: Item) -> bool:
    return any(isinstance(source, Frames) for source in item.pictures)


def _played(frames: list[tuple[Any, str]], blind: Blind | None, key: str) -> list[tuple[Any, str]]:
    """A video's frames as one of `FRAMES` shows them."""
    from mllm.processing.frames import in_order

    return [frames[k] for k in in_order(_play(blind), range(len(frames)), key)]


def _load_whole(item: Item, blind: Blind | None) -> Loaded:
    """An item whose videos stand as one visual each."""
    from mllm.processing.visual_hash import visual_hash

    visuals: list[Any] = []
    hashes: list[str] = []
    try:
        for source in item.pictures:
            if isinstance(source, Frames):
                visuals.append(source.video(_play(blind), item.id))
                hashes.append(visual_hash(visuals[-1], where=f"video {source.path}"))
                continue
            image, digest = source.load()
            visuals.append(blank(image) if blind == "gray" else image)
            hashes.append(f"gray {image.width}x{image.height}" if blind == "gray" else digest)
    except DataError as error:
        return Loaded(item, [], [], str(error))
    if blind == "none":
        return Loaded(item, [], [])
    counts = [source.count if isinstance(source, Frames) else 1 for source in item.pictures]
    return Loaded(replace(item, turns=_one_mark_each(item.turns, counts)), visuals, hashes)


def _one_mark_each(turns: Sequence[Turn], counts: Sequence[int]) -> list[Turn]:
    """Turns in which a run of as many marks as a video has frames is one mark."""
    skipped = iter([k > 0 for count in counts for k in range(count)])
    merged = []
    for turn in turns:
        first, *rest = turn.content.split(IMAGE_MARK)
        merged.append(
            replace(turn, content=first + "".join(("" if next(skipped) else IMAGE_MARK) + part for part in rest))
        )
    return merged


def _without_images(turns: Sequence[Turn]) -> list[Turn]:
    return [replace(turn, content=turn.content.replace(IMAGE_MARK, "").lstrip("\n")) for turn in turns]


def _row(loaded: Loaded, metrics: Sequence[Metric], response: Response, key: str, *, image_size: bool) -> Row:
    item = loaded.item
    meta = item.meta
    if image_size and loaded.size is not None:
        meta = meta | {"width": loaded.size[0], "height": loaded.size[1]}
    row: Row = {
        "id": item.id, "question": item.question, "prompt": response.prompt, "images": loaded.hashes,
        "output": response.text, "target": item.target, "meta": meta, "cluster": item.cluster,
        "category": item.category, "num_prompt_tokens": response.num_prompt_tokens, "num_tokens": response.num_tokens,
        "key": key,
    }  # fmt: skip
    if loaded.unusable is not None:
        return row | {"unusable": loaded.unusable, "extracted": "", "scores": {}}
    if response.logprob is not None:
        row["logprob"] = response.logprob
    if response.routing is not None:
        row["routing"] = response.routing
    if response.error is not None:
        row["error"] = response.error
    return row | score_fields(row, metrics)


def _keep_thumbnails(folder: Path, loaded: Loaded) -> None:
    """Small copies of an item's pictures for the report, named by hash."""
    place = folder / "thumbnails"
    place.mkdir(parents=True, exist_ok=True)
    for image, digest in zip(loaded.images[:4], loaded.hashes[:4]):
        if not isinstance(image, Image.Image):
            continue
        path = place / f"{digest[:24]}.jpg"
        if not path.exists():
            small = image.copy()
            small.thumbnail(
                (_THUMB, _THUMB), Image.Resampling.BILINEAR, reducing_gap=1.0
            )  # a ninth of the default's time
            part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
            small.save(part, "JPEG", quality=80)
            part.replace(path)
