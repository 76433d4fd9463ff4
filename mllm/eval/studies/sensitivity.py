"""How much does a score hang on what should not matter: wording, order of options, size and compression of pictures?"""

from __future__ import annotations

import io
import re
import string
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import ConfigError
from mllm.eval.cache import AnswerCache
from mllm.eval.data.loading import Item, TaskData, data_hash, load_data
from mllm.eval.data.pictures import Picture
from mllm.eval.data.templates import lettered
from mllm.eval.generators.base import Generator
from mllm.eval.ids import ByName
from mllm.eval.metrics.base import Mean
from mllm.eval.metrics.letters import gold_letters
from mllm.eval.predictions import Row, iterate_predictions
from mllm.eval.report.columns import Clusters
from mllm.eval.report.results import TaskResult
from mllm.eval.report.statistics import mean_estimate
from mllm.eval.run import evaluate_data
from mllm.eval.spool import Spool
from mllm.eval.studies.study import Study, Table, number, save_study, spread
from mllm.eval.task import TaskSpec, load_tasks
from mllm.types import IMAGE_MARK

Change = Callable[[Item], Item | None]
_LETTER_ASKED = re.compile(r"Answer with the option's letter from the given choices directly\.")
_WORD_ASKED = re.compile(r"Answer the question (?:using|with) a single word(?: or phrase)?\.")
_STYLES = (
    ("{letter}. {text}", "\n"),
    ("({letter}) {text}", "\n"),
    ("({letter}) {text}", " "),
    ("{letter}) {text}", "\n"),
)


@dataclass(frozen=True)
class Variation:
    """One way to ask the same thing otherwise. change: the item as it is asked then, None where it cannot be."""

    way: str
    name: str
    change: Change


def _reworded(item: Item, write: Callable[[str], str]) -> Item:
    """The last turn's words written otherwise; pictures stay where they stand."""
    *before, last = item.turns
    head = re.match(rf"(?:{re.escape(IMAGE_MARK)})*\n?", last.content)
    place = head.end() if head else 0
    return replace(item, turns=[*before, replace(last, content=last.content[:place] + write(last.content[place:]))])


def _with_another_request(text: str) -> str:
    text = _LETTER_ASKED.sub("Reply with the letter of the right option only.", text)
    return _WORD_ASKED.sub("Give the answer only, in a word or a few.", text)


WORDINGS: tuple[Callable[[str], str], ...] = (
    lambda text: f"Question: {text}",
    lambda text: f"{text}\nAnswer:",
    lambda text: f"Look at the image and answer. {text}",
    lambda text: (
        _with_another_request(text) if _with_another_request(text) != text else f"{text}\nGive the answer only."
    ),
    lambda text: f"Please help me with this. {text}",
)


def _reordered(item: Item, order: Callable[[int], list[int]]) -> Item | None:
    """The options in another order, the letter of the answer with them; None where the prompt does not list them in a
    form that is known."""
    options = item.meta.get("options") or []
    if len(options) < 2 or len(options) > len(string.ascii_uppercase) or item.target is None:
        return None
    places = order(len(options))
    moved = [options[place] for place in places]
    *before, last = item.turns
    for style, joiner in _STYLES:
        listing = lettered(options, style, joiner)
        if listing in last.content:
            letters = dict(zip(string.ascii_uppercase, options))
            gold = gold_letters(item.target, letters)
            target = [
                string.ascii_uppercase[places.index(string.ascii_uppercase.index(letter))] for letter in sorted(gold)
            ]
            content = last.content.replace(listing, lettered(moved, style, joiner), 1)
            shown = target[0] if len(target) == 1 else target
            return replace(
                item, turns=[*before, replace(last, content=content)], target=shown, meta=item.meta | {"options": moved}
            )
    return None


def _repainted(item: Item, paint: Callable[[Image.Image], bytes]) -> Item | None:
    """Every picture drawn anew; None for an item with a video or without a picture."""
    if not item.pictures or not all(isinstance(source, Picture) for source in item.pictures):
        return None
    pictures = [
        Picture(partial(_drawn, paint, source), source.label) for source in item.pictures if isinstance(source, Picture)
    ]
    return replace(item, pictures=list(pictures))


def _drawn(paint: Callable[[Image.Image], bytes], source: Picture) -> bytes:
    return paint(source.load()[0])


def _jpeg(quality: int, image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _resized(factor: float, image: Image.Image) -> bytes:
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def variations(ways: Sequence[str]) -> Iterator[Variation]:
    """The variations of some ways, in order. Raises `ConfigError` for an unknown way."""
    for way in ways:
        if way == "wording":
            for position, write in enumerate(WORDINGS, 1):
                yield Variation(way, f"wording {position}", partial(_reworded, write=write))
        elif way == "options":
            yield Variation(way, "options reversed", partial(_reordered, order=lambda n: list(range(n))[::-1]))
            yield Variation(way, "options turned by one", partial(_reordered, order=lambda n: [*range(1, n), 0]))
        elif way == "resize":
            for factor in (0.5, 0.75, 1.5):
                yield Variation(way, f"resize {factor:g}", partial(_repainted, paint=partial(_resized, factor)))
        elif way == "jpeg":
            for quality in (90, 50, 20):
                yield Variation(way, f"jpeg {quality}", partial(_repainted, paint=partial(_jpeg, quality)))
        else:
            raise ConfigError(f"ways {way!r}: expected some of {', '.join(WAYS)}")


WAYS = ("wording", "options", "resize", "jpeg")


def run_sensitivity(
    generator: Generator,
    tasks: Sequence[str | TaskSpec],
    folder: str | Path,
    *,
    ways: Sequence[str] = WAYS,
    limit: int | None = None,
    data: Mapping[str, str | Path] | None = None,
    cache: AnswerCache | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Study:
    """Ask every question as it is and in every variation, on the same samples. Answers lie in
    ``<folder>/sensitivity/<variation>/`` and are kept on a second call.

    ``flips`` of a way is the mean share of samples whose verdict is another than that of the plain question: the number beside
    the score. Raises `ConfigError` for an unknown way, before anything is asked.
    """
    chosen = list(variations(ways))
    place = Path(folder) / "sensitivity"
    rows, summary, notes, details = [], [], [], []
    for spec in load_tasks(tasks):
        loaded = load_data(spec, data=data, limit=limit)
        base = evaluate_data(generator, loaded, place / "as it is", cache=cache, resume=resume, progress=progress)
        plain = ByName((row["id"], verdict) for row, verdict in _verdicts(base))
        by_way: dict[str, list[tuple[float, float]]] = {}
        for variation in chosen:
            varied, left = _varied(loaded, variation)
            if not varied.items:
                notes.append(f"{spec.name}: no question can be asked with {variation.name}")
                continue
            result = evaluate_data(
                generator,
                varied,
                place / variation.name.replace(" ", "-"),
                cache=cache,
                resume=resume,
                progress=progress,
            )
            moved = _moved(plain, result)
            sure = mean_estimate(moved.flips, clusters=moved.clusters, binary=True)
            before, after = 100 * moved.before.value, 100 * moved.after.value
            by_way.setdefault(variation.way, []).append((100 * sure.value, after))
            rows.append((
                spec.name, variation.name, number(before), number(after), f"{after - before:+.2f}", number(100 * sure.value, 1),
                spread(100 * sure.low, 100 * sure.high, digits=1), str(len(moved.flips)),
            ))  # fmt: skip
            details.append({"task": spec.name, "way": variation.way, "variation": variation.name, "before": before, "after": after,
                            "flips": sure.value, "num_samples": len(moved.flips)})  # fmt: skip
            if left:
                notes.append(
                    f"{spec.name}: {left} questions cannot be asked with {variation.name} and are left out there"
                )
        for way, found in by_way.items():
            scores = [after for _, after in found]
            flips = sum(flip for flip, _ in found) / len(found)
            summary.append((
                spec.name, way, number(base.metrics[0].value), number(min(scores)), number(max(scores)), number(flips, 1)
            ))  # fmt: skip
    notes.append(
        "A flip is a sample whose verdict differs from the plain question's; scores are means over the same samples, in percent."
    )
    headings = ("task", "way", "score", "lowest", "highest", "flips %")
    columns = ("task", "variation", "as it is", "varied", "change", "flips %", "95 %", "n")
    tables = [Table("Sensitivity", headings, summary, 2), Table("Each variation", columns, rows, 2)]
    study = Study("sensitivity", "Sensitivity to what should not matter", notes, tables, {"variations": details})
    save_study(study, folder)
    return study


def _varied(data: TaskData, variation: Variation) -> tuple[TaskData, int]:
    items = Spool(changed for item in data.items if (changed := variation.change(item)) is not None)
    return replace(data, items=items, data_hash=data_hash(items)), len(data.items) - len(items)


@dataclass(frozen=True)
class _Moved:
    """What a variation did to the samples that could be scored both ways. flips: 0 or 1 of each; clusters: equal where two go
    together."""

    flips: np.ndarray
    clusters: np.ndarray
    before: Mean
    after: Mean


def _moved(plain: Mapping[str, float], result: TaskResult) -> _Moved:
    flips, clusters, before, after = array("d"), Clusters(), Mean(), Mean()
    for row, verdict in _verdicts(result):
        if (earlier := plain.get(row["id"])) is not None:
            flips.append(float(abs(verdict - earlier) > 0.25))
            clusters.append(row)
            before.append(earlier)
            after.append(verdict)
    return _Moved(np.array(flips), clusters.codes(), before, after)


def _verdicts(result: TaskResult) -> Iterator[tuple[Row, float]]:
    """(row, headline score) of each sample that could be scored, an unparsed reply as 0."""
    label = result.metrics[0].label
    for row in iterate_predictions(Path(result.path)):
        entry: Row | Any = row.get("scores", {}).get(label)
        if entry is not None and "error" not in entry:
            yield row, float(entry["value"] or 0.0)
