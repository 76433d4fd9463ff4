"""What is wrong with a dataset, before a run finds out?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from mllm.damage import opening
from mllm.data.lookup import load_dataset
from mllm.data.parallel import chunks, spread
from mllm.data.quarantine import (
    IMAGE_KINDS,
    ROW_KINDS,
    Entry,
    bad_mask,
    content_of,
    has_labels,
    read_quarantine,
    write_quarantine,
)
from mllm.data.sources import Source, open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import AlignmentError, ConfigError, DataError, MissingFile, blamed_on
from mllm.processing.codes import read_codes
from mllm.processing.frames import VideoSpec
from mllm.processing.images import load_image
from mllm.processing.protocol import Processor, TextTokenizer
from mllm.processing.videos import frames_of
from mllm.processing.visual_hash import visual_hash
from mllm.types import IMAGE_MARK, Sample, Video

KINDS = {
    "unreadable": "rows that cannot be read as a conversation",
    "placeholders": "placeholders and images differ in number",
    "missing image": "image files that are not there",
    "corrupt image": "images that do not decode",
    "masks": "masks that do not read or fit no picture",
    "no labels": "samples with nothing to learn from",
    "not encodable": "samples that tokenizer or template refuse",
    "too long": "samples that lose all their labels when cut",
}
LISTED = (*IMAGE_KINDS, *ROW_KINDS)
"""Kinds that the data alone decide. The others depend on tokenizer and settings: a list must not carry them to another run."""


@dataclass
class CheckReport:
    """What `check` found. Those of ``problems`` that the data alone decide went to ``quarantine``, where that was asked for;
    duplicates are only reported."""

    name: str
    rows: int
    checked: int
    fingerprint: str
    problems: list[Entry] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    """(row, earlier row with the same text and images)."""
    num_repeated_ids: int = 0
    num_images: int = 0
    num_text_only: int = 0
    num_remote: int = 0
    lengths: np.ndarray | None = None
    """Tokens of every checked row (0: not usable), when a tokenizer was given."""
    quarantine: Path | None = None
    recognised: str | None = None
    """How data without a declaration were read."""
    found_list: str | None = None
    """What a list that lies there already does to training."""

    @property
    def num_bad(self) -> int:
        """Rows that cannot be trained on."""
        return len(self.problems)

    def counts(self) -> dict[str, int]:
        """Problems by kind."""
        return {kind: sum(problem.kind == kind for problem in self.problems) for kind in KINDS}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the single problems."""
        lengths = self.lengths[self.lengths > 0] if self.lengths is not None else None
        return {
            "name": self.name,
            "rows": self.rows,
            "checked": self.checked,
            "fingerprint": self.fingerprint,
            "problems": self.counts(),
            "duplicates": len(self.duplicates),
            "repeated_ids": self.num_repeated_ids,
            "images": self.num_images,
            "text_only": self.num_text_only,
            "tokens": None if lengths is None or not len(lengths) else quantiles(lengths),
            "quarantine": str(self.quarantine) if self.quarantine else None,
        }

    def print(self, console: Any = None) -> None:
        """Tables on the terminal: problems, examples, token lengths."""
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        if self.recognised is not None:
            console.print(self.recognised, soft_wrap=True)
        console.print(
            f"[bold]{self.name}[/]: {self.checked} of {self.rows} rows checked, {self.num_images} images, "
            f"{self.num_text_only} text-only samples"
        )
        table = Table("found", "rows", "example", box=None, pad_edge=False)
        for kind, count in self.counts().items():
            table.add_row(KINDS[kind], f"[red]{count}[/]" if count else "0", "below" if count else "")
        example = "row {} repeats row {}".format(*self.duplicates[0]) if self.duplicates else ""
        table.add_row("duplicates (reported only)", str(len(self.duplicates)), example)
        table.add_row("ids used again (reported only)", str(self.num_repeated_ids), "")
        console.print(table)
        for (
            kind,
            count,
        ) in self.counts().items():  # whole: what is wrong, with the row's keys and the cure, must be readable
            if count:
                example = next(problem.reason for problem in self.problems if problem.kind == kind)
                console.print(f"{kind}: {example[:1000]}", markup=False, highlight=False, soft_wrap=True)
        if self.lengths is not None and (self.lengths > 0).any():
            console.print(_histogram(self.lengths[self.lengths > 0]))
        if self.quarantine is not None:
            listed = sum(problem.kind in LISTED for problem in self.problems)
            console.print(f"{listed} rows on the quarantine list {self.quarantine}; training leaves them out")
            return
        if self.found_list is not None:
            console.print(f"a list is there already. {self.found_list}", soft_wrap=True)
        if self.num_bad:
            console.print("nothing was written; with --write-quarantine training leaves these rows out", soft_wrap=True)


class _Row(NamedTuple):
    row: int
    id: str
    problem: Entry | None
    digest: bytes
    num_images: int
    length: int


def check(
    dataset: DatasetSpec | Source | str | Path,
    processor: Processor | TextTokenizer | None = None,
    *,
    max_length: int | None = None,
    processes: int = 1,
    limit: int | None = None,
    quarantine: Path | str | None = None,
    write: bool | None = None,
    progress: bool = True,
) -> CheckReport:
    """Read every row of a dataset, decode every image, count every token; when asked, write the quarantine list.

    dataset: a declaration, a source, a YAML's name or path, or data themselves (`mllm.data.recognise`). processor:
    an `mllm` processor, or a tokenizer (then text only is counted). max_length: also find samples that would lose all
    labels when cut. write: put the bad rows on the list that training leaves out, at ``quarantine`` (naming a place asks
    for it too) or beside the data, where training looks. The list is replaced, and is empty when all is well.
    """
    source = dataset if isinstance(dataset, Source) else open_source(_spec(dataset))
    writes = write if write is not None else quarantine is not None
    if writes and source.shards is not None:
        raise ConfigError(
            f"{source.name} lies in shards, whose rows have no number that a quarantine list could leave out; damaged rows are replaced "
            "while training (max_bad_share), or write the shards without them"
        )
    total = min(len(source), limit or len(source))
    work = partial(_check_rows, source, processor, max_length)
    parts = chunks(total, 64 if total > 512 else max(1, total // max(processes, 1) or 1))
    rows: list[_Row] = []
    with _progress(f"checking {source.name}", total, progress) as advance:
        for part in spread(work, parts, processes):
            rows.extend(part)
            advance(len(part))
    report = _report(source, rows, counted=processor is not None)
    report.recognised = source.spec.recognised
    if writes:
        report.quarantine = Path(quarantine) if quarantine else source.quarantine_path()
        head = {
            "dataset": report.name,
            "fingerprint": report.fingerprint,
            "rows": report.rows,
            "checked": report.checked,
        }
        write_quarantine(report.quarantine, head, (p for p in report.problems if p.kind in LISTED))
    elif source.quarantine_path().is_file():
        report.found_list = _found_list(source)
    return report


def _found_list(source: Source) -> str | None:
    try:
        return read_quarantine(source).describe(source.name, len(source))
    except DataError as error:
        return str(error)


def check_source(
    source: str | Path,
    *,
    image_root: Path | str | None = None,
    checkpoint: str | None = None,
    quarantine: Path | str | None = None,
    write: bool = False,
    processes: int = 1,
    limit: int | None = None,
) -> CheckReport:
    """`check` for the command line. image_root: folder that image paths start from; checkpoint: model or tokenizer to count
    with."""
    spec = _spec(source)
    if image_root is not None:
        spec = spec.model_copy(update={"image_root": str(image_root)})
    processor = load_counter(checkpoint) if checkpoint else None
    return check(spec, processor, processes=processes, limit=limit, quarantine=quarantine, write=write or None)


def load_counter(checkpoint: str) -> Any:
    """The processor of a checkpoint, or the tokenizer when that is all there is."""
    import transformers

    import mllm  # noqa: F401  (registers the processor with AutoProcessor)

    try:
        with opening(checkpoint):
            return transformers.AutoProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint}: no processor or tokenizer loads from there ({error})") from error


def tokens_of(sample: Sample, processor: Processor | TextTokenizer) -> int:
    """Tokens of a sample: as the model gets them with an `mllm` processor; the turns' text alone with a tokenizer."""
    if hasattr(processor, "image_layouts"):
        from mllm.processing.chat import count_tokens

        return count_tokens(cast("Processor", processor), sample, where=f"sample {sample.id!r}")
    return sum(len(processor(turn.content.replace(IMAGE_MARK, ""))["input_ids"]) for turn in sample.turns)


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Median, 90th and 99th percentile, maximum and sum."""
    p50, p90, p99 = (int(v) for v in np.percentile(lengths, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "max": int(lengths.max()), "sum": int(lengths.sum())}


def _spec(dataset: DatasetSpec | str | Path) -> DatasetSpec:
    return dataset if isinstance(dataset, DatasetSpec) else load_dataset(str(dataset))


def _check_rows(
    source: Source, processor: Processor | TextTokenizer | None, max_length: int | None, rows: range
) -> list[_Row]:
    return [_check_row(source, processor, max_length, row) for row in rows]


def _check_row(source: Source, processor: Processor | TextTokenizer | None, max_length: int | None, row: int) -> _Row:
    def bad(kind: str, reason: str, identity: str = str(row), **more: Any) -> _Row:
        return _Row(row, identity, Entry(row, identity, kind, reason, **more), b"", 0, 0)

    try:
        sample = source[row]
    except AlignmentError as error:
        return bad("placeholders", str(error))
    except DataError as error:
        return bad("unreadable", str(error))
    where = source.where(row, sample.id)
    digest = hashlib.sha256(json.dumps([(t.role, t.content) for t in sample.turns]).encode())
    count = len(sample.images)
    for position, image in enumerate(sample.images):
        here = f"{where}, image {position}"
        try:
            with blamed_on(here):
                if isinstance(image, Video):
                    _watch(image, processor, here)
                elif read_codes(image, where=here) is None:
                    load_image(image, where=here)
                digest.update(visual_hash(image, where=here).encode())
        except DataError as error:
            kind = "missing image" if isinstance(error, MissingFile) else "corrupt image"
            found = bad(kind, str(error), sample.id, image=position, content=content_of(image))
            return found._replace(num_images=count)
    if (wrong := bad_mask(sample, where=where)) is not None:
        return bad("masks", wrong, sample.id)._replace(num_images=count)
    if not has_labels(sample):
        return bad("no labels", f"{where}: no assistant turn to learn from", sample.id)._replace(num_images=count)
    length = 0
    if processor is not None:
        try:
            with blamed_on(where):
                length = tokens_of(sample, processor)
                _taught(sample, processor, where)
                if max_length is not None and length > max_length and hasattr(processor, "image_layouts"):
                    problem = _cut(sample, cast("Processor", processor), max_length, where)
                    if problem is not None:
                        return bad(*problem, sample.id)._replace(num_images=count)
        except (DataError, AlignmentError) as error:
            return bad("not encodable", str(error), sample.id)._replace(num_images=count)
    return _Row(row, sample.id, None, digest.digest(), count, length)


def _taught(sample: Sample, processor: Processor | TextTokenizer, where: str) -> None:
    """Lay out what the model's heads learn of a sample. Raises `DataError` where it does not fit."""
    if not hasattr(processor, "image_layouts"):
        return
    from mllm.processing.chat import encode_text, geometry_of, masks_of, sample_layouts, split_images

    own = cast("Processor", processor)
    visuals, _ = split_images(sample.turns, sample.images, drawn=getattr(own, "span", None) is not None)
    if sample.masks or getattr(own, "segments", None) is not None:
        layouts = sample_layouts(own, sample, visuals, where)
        ids, labels = encode_text(own, sample.turns, tools=sample.meta.get("tools"), where=where, layouts=layouts)
        masks_of(own, sample, visuals, ids, labels, where=where)
    geometry_of(own, sample, visuals, where=where)


def _watch(video: Video, processor: Processor | TextTokenizer | None, where: str) -> None:
    """Decode the frames that a model sees; without one, some of the whole."""
    rules = getattr(processor, "rules", None)
    seen = frames_of(video, getattr(rules, "video", None) or VideoSpec(frames=8), where=where)
    for _ in seen.pictures():
        pass


def _cut(sample: Sample, processor: Processor, max_length: int, where: str) -> tuple[str, str] | None:
    from mllm.processing.chat import IGNORE, encode_text, sample_layouts, split_images
    from mllm.processing.layout import before_cut, visual_spans

    drawn = getattr(processor, "span", None) is not None
    layouts = sample_layouts(processor, sample, split_images(sample.turns, sample.images, drawn=drawn)[0], where)
    ids, labels = encode_text(processor, sample.turns, tools=sample.meta.get("tools"), where=where, layouts=layouts)
    cut = before_cut(visual_spans(ids, processor.image_token_id, layouts), max_length)
    if (labels[1:cut] != IGNORE).any():
        return None
    return "too long", f"{where}: {len(ids)} tokens, and no label within max_length={max_length}"


def _report(source: Source, rows: list[_Row], *, counted: bool) -> CheckReport:
    report = CheckReport(source.name, len(source), len(rows), source.fingerprint)
    seen: dict[bytes, int] = {}
    ids: set[str] = set()
    for row in rows:
        report.num_repeated_ids += row.id in ids
        ids.add(row.id)
        report.num_images += row.num_images
        if row.problem is not None:
            report.problems.append(row.problem)
            continue
        report.num_text_only += row.num_images == 0
        if row.digest in seen:
            report.duplicates.append((row.row, seen[row.digest]))
        else:
            seen[row.digest] = row.row
    if counted:
        report.lengths = np.array([0 if row.problem else row.length for row in rows], np.int32)
    return report


class _progress:
    """A rich progress bar as a context that yields ``advance(count)``."""

    def __init__(self, title: str, total: int, shown: bool):
        self.title, self.total, self.shown = title, total, shown

    def __enter__(self) -> Callable[[int], Any]:
        if not self.shown:
            return lambda count: None
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, transient=True)
        self.bar.start()
        task = self.bar.add_task(self.title, total=self.total)
        return lambda count: self.bar.advance(task, count)

    def __exit__(self, *_: Any) -> None:
        if self.shown:
            self.bar.stop()


def _histogram(lengths: np.ndarray, bins: int = 12) -> str:
    edges = np.unique(np.linspace(0, int(lengths.max()), bins + 1).astype(int))
    edges[-1] += 1
    counts, _ = np.histogram(lengths, edges)
    top = max(int(counts.max()), 1)
    lines = [f"tokens: {', '.join(f'{k} {v}' for k, v in quantiles(lengths).items())}"]
    for low, high, count in zip(edges[:-1], edges[1:], counts):
        lines.append(f"{low:>7}-{high - 1:<7} {'█' * round(40 * count / top)} {count}")
    return "\n".join(lines)
