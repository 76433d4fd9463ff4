"""How are a benchmark's files read into rows?"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm.data.files import JsonRows
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.data.pictures import Picture
from mllm.eval.data.refer import refer_rows
from mllm.eval.task import JoinSpec, SourceSpec, TaskSpec
from mllm.hub import hub_reason

Row = dict[str, Any]
_REFERENCE_LENGTH = 64
_LISTED = 4
"""Files of a layout that a message names."""
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Found:
    """A source whose files are there. rows: reads them anew at every call; folder: where relative picture paths
    start."""

    source: SourceSpec
    folder: Path
    rows: Callable[[], Iterator[Row]]


def find_sources(task: TaskSpec, place: Path | None) -> list[Found]:
    """The task's sources whose files are at ``place`` (a folder, or one file), in the task's order; without a place,
    those on the hub. Raises `ConfigError` when none's files are there, `UnavailableError` when nothing is said at
    all."""
    found = []
    if place is not None:
        single = place.suffix.lstrip(".").lower() if place.is_file() else None
        for source in task.sources:
            if single is None:
                files = _locate(source, place)
            else:
                fits = source.format == single or (source.format == "hub" and single == "parquet")
                files = [(place, {"_config": ""})] if fits else []
            folder = place if single is None else place.parent
            if files:
                read = _FORMATS[source.format]
                found.append(
                    Found(source, folder, partial(_decorate, source, partial(read, source, files, folder), folder))
                )
        if not found:
            raise ConfigError(f"{task.name}: {place} holds none of its file layouts. Looked for {_layouts(task)}")
        return found
    for source in task.sources:
        if source.format == "hub":
            found.append(Found(source, Path(), partial(_decorate, source, partial(_from_hub, task, source), Path())))
    if not found:
        raise UnavailableError(f"{task.name}: no data. {whereabouts(task)}")
    return found


def whereabouts(task: TaskSpec) -> str:
    """Which files a task wants, where they come from, and how to say where they are."""
    origin = {
        f"hf download {source.hub} --repo-type dataset{f' --revision {source.revision}' if source.revision else ''} "
        f"--local-dir /folder": None
        for source in task.sources
        if source.hub
    }
    return (
        f"Say where its files are with --data {task.name}=/folder (in Python: data={{{task.name!r}: folder}}), or put "
        f"them into $MLLM_DATA/{task.folder or task.name}. One of these will do:\n    "
        + _layouts(task).replace("; ", "\n    ")
        + "".join(f"\n    from the hub: {command}" for command in origin)
        + (f"\n    about the benchmark: {task.paper}" if task.paper else "")
    )


def _layouts(task: TaskSpec) -> str:
    """Each source with the files it wants."""
    told = []
    for source in task.sources:
        patterns = _patterns(source)
        more = len(patterns) > _LISTED
        files = ", ".join(patterns[:_LISTED]) + (f" … ({len(patterns)} in all)" if more else "")
        told.append(f"{source.name}: {files}")
    return "; ".join(told)


def _patterns(source: SourceSpec) -> list[str]:
    if source.format == "hub":
        if not source.configs:
            return [f"data/{source.split}-*.parquet", f"{source.split}-*.parquet", f"*/{source.split}-*.parquet"]
        return [
            pattern
            for c in source.configs
            for pattern in (f"{c}/{source.split}-*.parquet", f"data/{c}/{source.split}-*.parquet")
        ]
    return ["<category>/*.txt"] if source.format == "mme" else [*source.needs, *(file.path for file in source.files)]


def _locate(source: SourceSpec, place: Path) -> list[tuple[Path, Row]]:
    """Files of a source in a folder, with the fields they add; empty when one is missing."""
    if any(not any(place.glob(needed)) for needed in source.needs):
        return []
    if source.format == "mme":
        return [(path, {}) for path in sorted(place.glob("*/**/*.txt")) if path.parent.name != "eval_tool"]
    if source.format == "hub":
        if source.configs:
            found = [
                (path, {"_config": c})
                for c in source.configs
                for path in sorted(place.glob(f"**/{c}/{source.split}-*.parquet"))
            ]
            return found if {row["_config"] for _, row in found} == set(source.configs) else []
        for pattern in _patterns(source):
            if paths := sorted(place.glob(pattern)):
                return [(path, {"_config": path.parent.name}) for path in paths]
        return []
    located: list[tuple[Path, Row]] = []
    for file in source.files:
        paths = sorted(place.glob(file.path)) if "*" in file.path else [p for p in [place / file.path] if p.is_file()]
        if not paths:
            return []
        located.extend((path, dict(file.fields)) for path in paths)
    return located


def _decorate(source: SourceSpec, read: Callable[[], Iterable[Row]], folder: Path) -> Iterator[Row]:
    """Rows with their number and the source's lists, one per entry of the exploded field."""
    lists = {name: (folder / path).read_text(encoding="utf-8").split() for name, path in source.lists.items()}
    index = 0
    for row in read():
        entries = [row]
        if source.explode is not None:
            values = row.get(source.explode)
            if not isinstance(values, list | tuple):
                raise DataError(
                    f"{source.name}: field {source.explode!r} of row {index} is not a list; explode needs one"
                )
            entries = [row | {source.explode: value, "_part": part} for part, value in enumerate(values)]
        for entry in entries:
            yield entry | {"_index": index, "_lists": lists, "_folder": folder}
            index += 1


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises `DataError` naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None


def _records(data: Any, records: str | None, path: Path) -> Iterator[Row]:
    for key in records.split(".") if records else []:
        if not isinstance(data, dict) or key not in data:
            raise DataError(
                f"{path}: no {records!r} in it; keys: {', '.join(map(str, data)) if isinstance(data, dict) else '-'}"
            )
        data = data[key]
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if entries is None:
        raise DataError(f"{path}: expected a list or mapping of rows{f' under {records!r}' if records else ''}")
    for key, row in entries:
        if not isinstance(row, dict):
            raise DataError(f"{path}: entry {key!r} is {type(row).__name__}, expected a mapping of fields")
        yield {**row, "_key": key}


def _read_json_source(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    other: dict[str, Row] = {}
    if source.join is not None:
        join_path = place / source.join.path
        other = _by_key(_records(read_json(join_path), source.join.records, join_path), source.join, join_path)
    for path, fields in files:
        for row in _records(read_json(path), source.records, path):
            partner = other.get(str(row.get(source.join.by)), {}) if source.join is not None else {}
            yield {**partner, **row, **fields, "_file": path.stem, "_joined": bool(partner) or source.join is None}


def _read_jsonl(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    for path, fields in files:
        for row in JsonRows(path):  # as training reads it
            yield {**row, **fields, "_file": path.stem}


def _read_table(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    for path, fields in files:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t" if source.format == "tsv" else ","))
        pictures = {}
        if source.image_key is not None:
            pictures = {row.get(source.image_key): row.get("image") for row in rows}
        for number, row in enumerate(rows, 2):
            if None in row:
                raise DataError(f"{path}:{number}: the row has more cells than the header")
            image = row.get("image")
            if pictures and image is not None and len(image) <= _REFERENCE_LENGTH:
                if image not in pictures:
                    raise DataError(f"{path}:{number}: image refers to row {image!r}, which does not exist")
                row["image"] = pictures[image]
            yield {**row, **fields, "_file": path.stem}


def _by_key(rows: Iterable[Row], join: JoinSpec, where: object) -> dict[str, Row]:
    key = join.key or join.by
    table: dict[str, Row] = {}
    for row in rows:
        if key not in row:
            raise DataError(f"{where}: a row has no field {key!r}")
        table[str(row[key])] = row
    return table


def _read_parquet(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    """Rows of parquet files. Pictures stay in the file until they are used."""
    try:
        from mllm.eval.data.parquet import parquet_rows
    except ImportError:
        raise UnavailableError("parquet files need pyarrow; install mllm[eval]") from None
    other: dict[str, Row] = {}
    if source.join is not None:
        paths = _config_files(place, source.join.path, source.join.split or str(source.split))
        if not paths:
            raise ConfigError(f"{source.name}: no parquet file of {source.join.path!r} in {place}")
        other = _by_key((row for path in paths for row in parquet_rows(path)), source.join, source.join.path)
    for path, fields in files:
        for row in parquet_rows(path):
            partner = other.get(str(row.get(source.join.by)), {}) if source.join is not None else {}
            yield {**partner, **row, **fields, "_file": path.stem}


def _config_files(place: Path, config: str, split: str) -> list[Path]:
    return sorted({*place.glob(f"{config}/{split}-*.parquet"), *place.glob(f"*/{config}/{split}-*.parquet")})


def _read_mme(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    """MME's release: per category a folder of ``name.txt`` (lines of question, tab, Yes or No) beside the pictures, or
    with the pictures in ``images/`` and the texts in ``questions_answers_YN/``."""
    for path, _ in files:
        category = path.relative_to(place).parts[0]
        folder = path.parent.parent / "images" if path.parent.name == "questions_answers_YN" else path.parent
        found = [folder / f"{path.stem}{suffix}" for suffix in _IMAGE_SUFFIXES]
        image = next((candidate for candidate in found if candidate.is_file()), found[0])
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            question, tab, answer = line.partition("\t")
            if not tab:
                raise DataError(f"{path}:{number}: expected question, tab, answer")
            yield {
                "question": question, "answer": answer.strip(), "category": category, "number": number,
                "question_id": f"{category}/{path.stem}", "image": str(image.relative_to(place)), "_file": path.stem,
            }  # fmt: skip


def _read_refer(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    for path, fields in files:
        for row in refer_rows(path):
            yield {**row, **fields, "_file": path.stem}


def _from_hub(task: TaskSpec, source: SourceSpec) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise UnavailableError(
            f"{task.name}: reading {source.hub} from the hub needs datasets; install mllm[eval]"
        ) from None
    hub, split = str(source.hub), str(source.split)
    for config in source.configs or [None]:
        try:
            table = datasets.load_dataset(hub, config, split=split, revision=source.revision)
        except Exception as error:
            raise UnavailableError(
                f"{task.name}: {source.hub} could not be loaded ({hub_reason(error, source.hub)}). {whereabouts(task)}"
            ) from None
        other: dict[str, Row] = {}
        if source.join is not None:
            second = datasets.load_dataset(
                hub, source.join.path, split=source.join.split or split, revision=source.revision
            )
            other = _by_key(_hub_rows(datasets, second, source.join.path), source.join, source.join.path)
        for row in _hub_rows(datasets, table, config):
            yield {**(other.get(str(row.get(source.join.by)), {}) if source.join is not None else {}), **row}


def _hub_rows(datasets: Any, table: Any, config: str | None) -> Iterator[Row]:
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    for name in images:
        table = table.cast_column(name, datasets.Image(decode=False))
    rest = table.remove_columns(images)
    for number, row in enumerate(rest):
        pictures = {name: Picture(_lazy(table, number, name), f"{name} of row {number}") for name in images}
        yield {**row, **pictures, "_config": config or "default", "_file": config or ""}


def _lazy(table: Any, number: int, name: str) -> Callable[[], bytes]:
    def read() -> bytes:
        cell = table[number][name]
        if cell is None:
            raise DataError(f"{name} of row {number} is empty")
        return cell["bytes"] or Path(cell["path"]).read_bytes()

    return read


_FORMATS: dict[str, Callable[[SourceSpec, Sequence[tuple[Path, Row]], Path], Iterator[Row]]] = {
    "json": _read_json_source, "jsonl": _read_jsonl, "tsv": _read_table, "csv": _read_table, "parquet": _read_parquet,
    "hub": _read_parquet, "mme": _read_mme, "refer": _read_refer,
}  # fmt: skip
