"""What is wrong with a dataset, before a run finds out?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm.data.files import JsonRows
from mllm.data.parallel import chunks, pool_context
from mllm.data.sources import Source, open_source
from mllm.data.spec import ColumnMap, DatasetSpec, load_dataset
from mllm.errors import AlignmentError, ConfigError, DataError, MissingFile, blamed_on
from mllm.processing.codes import read_codes
from mllm.processing.images import image_hash, load_image
from mllm.types import IMAGE_MARK, Sample

KINDS = {
    "unreadable": "rows that are not a conversation",
    "placeholders": "placeholders and images differ in number",
    "missing image": "image files that are not there",
    "corrupt image": "images that do not decode",
    "no labels": "samples with nothing to learn from",
    "too long": "samples that lose all their labels when cut",
}


class Problem(NamedTuple):
    """Why a row cannot be trained on."""

    row: int
    id: str
    kind: str
    reason: str


@dataclass
class CheckReport:
    """What `check` found. ``problems`` went to ``quarantine``; duplicates are only reported."""

    name: str
    rows: int
    checked: int
    fingerprint: str
    problems: list[Problem] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    """(row, earlier row with the same text and images)."""
    num_repeated_ids: int = 0
    num_images: int = 0
    num_text_only: int = 0
    num_remote: int = 0
    lengths: np.ndarray | None = None
    """Tokens of every checked row (0: not usable), when a tokenizer was given."""
    quarantine: Path | None = None

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
        console.print(
            f"[bold]{self.name}[/]: {self.checked} of {self.rows} rows checked, {self.num_images} images, "
            f"{self.num_text_only} text-only samples"
        )
        table = Table("found", "rows", "example", box=None, pad_edge=False)
        for kind, count in self.counts().items():
            example = next((problem.reason for problem in self.problems if problem.kind == kind), "")
            table.add_row(KINDS[kind], f"[red]{count}[/]" if count else "0", _short(example))
        example = "row {} repeats row {}".format(*self.duplicates[0]) if self.duplicates else ""
        table.add_row("duplicates (reported only)", str(len(self.duplicates)), example)
        table.add_row("ids used again (reported only)", str(self.num_repeated_ids), "")
        console.print(table)
        if self.lengths is not None and (self.lengths > 0).any():
            console.print(_histogram(self.lengths[self.lengths > 0]))
        if self.quarantine is not None:
            console.print(f"{self.num_bad} rows on the quarantine list {self.quarantine}; training leaves them out")


class _Row(NamedTuple):
    row: int
    id: str
    problem: tuple[str, str] | None
    digest: bytes
    num_images: int
    length: int


def check(
    dataset: DatasetSpec | Source | str | Path,
    processor: Any = None,
    *,
    max_length: int | None = None,
    processes: int = 1,
    limit: int | None = None,
    quarantine: Path | str | None = None,
    write: bool = True,
    progress: bool = True,
) -> CheckReport:
    """Read every row of a dataset, decode every image, count every token, and write the quarantine list.

    dataset: a declaration, a source, a YAML's name or path, or a json, jsonl or table file (`guess_spec`). processor:
    an `mllm` processor, or a tokenizer (then text only is counted). max_length: also find samples that would lose all
    labels when cut. quarantine: default beside the data, where training looks for it; write=False leaves disk alone.
    The list is replaced, and is empty when all is well.
    """
    source = dataset if isinstance(dataset, Source) else open_source(_spec(dataset))
    total = min(len(source), limit or len(source))
    work = partial(_check_rows, source, processor, max_length)
    parts = chunks(total, 64 if total > 512 else max(1, total // max(processes, 1) or 1))
    rows: list[_Row] = []
    with _progress(f"checking {source.name}", total, progress) as advance:
        if processes > 1:
            with ProcessPoolExecutor(processes, mp_context=pool_context()) as pool:
                for part in pool.map(work, parts):
                    rows.extend(part)
                    advance(len(part))
        else:
            for part in map(work, parts):
                rows.extend(part)
                advance(len(part))
    report = _report(source, rows, counted=processor is not None)
    if write:
        report.quarantine = Path(quarantine) if quarantine else source.quarantine_path()
        _write_quarantine(report)
    return report


def check_source(
    source: str | Path,
    *,
    images: Path | str | None = None,
    checkpoint: str | None = None,
    quarantine: Path | str | None = None,
    processes: int = 1,
    limit: int | None = None,
) -> CheckReport:
    """`check` for the command line. images: folder that image paths start from; checkpoint: model or tokenizer to count
    with."""
    spec = _spec(source)
    if images is not None:
        spec = spec.model_copy(update={"image_root": str(images)})
    processor = load_counter(checkpoint) if checkpoint else None
    return check(spec, processor, processes=processes, limit=limit, quarantine=quarantine)


def load_counter(checkpoint: str) -> Any:
    """The processor of a checkpoint, or the tokenizer when that is all there is."""
    import transformers

    import mllm  # noqa: F401  (registers the processor with AutoProcessor)

    try:
        return transformers.AutoProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint}: no processor or tokenizer loads from there ({error})") from error


def guess_spec(path: Path) -> DatasetSpec:
    """A declaration for a file without one, by what its first row holds. Raises `ConfigError` when that does not
    tell."""
    options: dict[str, Any] = {"name": path.stem, "path": str(path)}
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(
            f"{path}: a table needs to be told what its columns mean; write a dataset YAML with format: columns"
        )
    rows = JsonRows(path)
    if not len(rows):
        raise DataError(f"{path} holds no rows")
    first = rows[0]
    if "messages" in first:
        return DatasetSpec(format="messages", **options)
    if "conversations" in first or "conversation" in first:
        return DatasetSpec(format="sharegpt", **options)
    if "question" in first and ("answer" in first or "label" in first):
        image = next((name for name in ("image", "images") if name in first), None)
        answer = "answer" if "answer" in first else "label"
        columns = ColumnMap(question="question", answer=answer, id="id" if "id" in first else None)
        columns = columns.model_copy(update={image: image}) if image else columns
        return DatasetSpec(format="columns", columns=columns, **options)
    raise ConfigError(
        f"{path}: the first row has the keys {', '.join(first)}; expected messages, conversations, or question and "
        "answer. Write a dataset YAML with format: columns"
    )


def tokens_of(sample: Sample, processor: Any) -> int:
    """Tokens of a sample: as the model gets them with an `mllm` processor; the turns' text alone with a tokenizer."""
    if hasattr(processor, "num_image_tokens"):
        from mllm.processing.chat import encode_text

        return len(encode_text(processor, sample.turns, where=f"sample {sample.id!r}")[0])
    return sum(len(processor(turn.content.replace(IMAGE_MARK, ""))["input_ids"]) for turn in sample.turns)


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Median, 90th and 99th percentile, maximum and sum."""
    p50, p90, p99 = (int(v) for v in np.percentile(lengths, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "max": int(lengths.max()), "sum": int(lengths.sum())}


def _spec(dataset: DatasetSpec | str | Path) -> DatasetSpec:
    if isinstance(dataset, DatasetSpec):
        return dataset
    path = Path(dataset)
    if path.suffix in (".yaml", ".yml") or not path.is_file():
        if path.suffix in (".json", ".jsonl", ".parquet", ".csv"):
            raise DataError(f"no such file: {path}")
        return load_dataset(str(dataset))
    return guess_spec(path)


def _check_rows(source: Source, processor: Any, max_length: int | None, rows: range) -> list[_Row]:
    return [_check_row(source, processor, max_length, row) for row in rows]


def _check_row(source: Source, processor: Any, max_length: int | None, row: int) -> _Row:
    try:
        sample = source[row]
    except AlignmentError as error:
        return _Row(row, str(row), ("placeholders", str(error)), b"", 0, 0)
    except DataError as error:
        return _Row(row, str(row), ("unreadable", str(error)), b"", 0, 0)
    where = source.where(row, sample.id)
    digest = hashlib.sha256(json.dumps([(t.role, t.content) for t in sample.turns]).encode())
    problem: tuple[str, str] | None = None
    for position, image in enumerate(sample.images):
        here = f"{where}, image {position}"
        try:
            if read_codes(image, where=here) is None:
                load_image(image, where=here)
            digest.update(image_hash(image, where=here).encode())
        except DataError as error:
            problem = ("missing image" if isinstance(error, MissingFile) else "corrupt image", str(error))
            break
    if problem is None and not any(t.role == "assistant" and t.learn and t.content.strip() for t in sample.turns):
        problem = ("no labels", f"{where}: no assistant turn to learn from")
    length = 0
    if problem is None and processor is not None:
        try:
            with blamed_on(where):
                length = tokens_of(sample, processor)
                if max_length is not None and length > max_length and hasattr(processor, "num_image_tokens"):
                    problem = _cut(sample, processor, max_length, where)
        except DataError as error:
            problem = ("unreadable", str(error))
    return _Row(row, sample.id, problem, digest.digest(), len(sample.images), length)


def _cut(sample: Sample, processor: Any, max_length: int, where: str) -> tuple[str, str] | None:
    from mllm.processing.chat import IGNORE, encode_text

    ids, labels = encode_text(processor, sample.turns, where=where)
    cut = max_length - int((ids[:max_length] == processor.image_token_id).sum()) % max(processor.num_image_tokens, 1)
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
            report.problems.append(Problem(row.row, row.id, *row.problem))
            continue
        report.num_text_only += row.num_images == 0
        if row.digest in seen:
            report.duplicates.append((row.row, seen[row.digest]))
        else:
            seen[row.digest] = row.row
    if counted:
        report.lengths = np.array([0 if row.problem else row.length for row in rows], np.int32)
    return report


def _write_quarantine(report: CheckReport) -> None:
    path = report.quarantine
    assert path is not None
    header = {"dataset": report.name, "fingerprint": report.fingerprint, "rows": report.rows, "checked": report.checked}
    lines = [header, *(problem._asdict() for problem in report.problems)]
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


def _short(text: str, width: int = 110) -> str:
    """The two ends of a long text: the sample's name stands in front, the file's name and the reason behind."""
    return text if len(text) <= width else f"{text[: width // 3]}…{text[-(width - width // 3 - 1) :]}"
