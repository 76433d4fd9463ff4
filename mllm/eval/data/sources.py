"""How are a benchmark's files read into rows?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm.data.files import text_rows
from mllm.data.refer import refer_rows
from mllm.data.tables import json_entries, open_files, open_hub
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.data.stored import stored_rows
from mllm.eval.task import JoinSpec, SourceSpec, TaskSpec

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
    layouts = []
    for source in task.sources:
        patterns = _patterns(source)
        more = len(patterns) > _LISTED
        files = ", ".join(patterns[:_LISTED]) + (f" … ({len(patterns)} in all)" if more else "")
        layouts.append(f"{source.name}: {files}")
    return "; ".join(layouts)


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
        entries = _exploded(source, row, index)
        for entry in entries:
            yield entry | {"_index": index, "_lists": lists, "_folder": folder}
            index += 1


def _exploded(source: SourceSpec, row: Row, index: int) -> list[Row]:
    """A row as the rows that it stands for."""
    name = source.explode
    if name is None:
        return [row]
    if isinstance(name, dict):
        ((name, places),) = name.items()
        if absent := [place for place in places if place not in row]:
            raise DataError(f"{source.name}: row {index} has no {', '.join(absent)}; its fields: {', '.join(row)}")
        return [row | {name: row[place], "_part": part} for part, place in enumerate(places)]
    values = row.get(name)
    if not isinstance(values, list | tuple):
        raise DataError(
            f"{source.name}: field {name!r} of row {index} is not a list; explode needs one. Its fields: {', '.join(row)}"
        )
    return [row | {name: value, "_part": part} for part, value in enumerate(values)]


def _records(path: Path, records: str | None) -> Iterator[Row]:
    return ({**row, "_key": key} for key, row in json_entries(path, records))


def _read_json_source(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    other: dict[str, Row] = {}
    if source.join is not None:
        join_path = place / source.join.path
        other = _by_key(_records(join_path, source.join.records), source.join, join_path)
    for path, fields in files:
        for row in _records(path, source.records):
            partner = other.get(str(row.get(source.join.by)), {}) if source.join is not None else {}
            yield {**partner, **row, **fields, "_file": path.stem, "_joined": bool(partner) or source.join is None}


def _read_text(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    for path, fields in files:
        rows = text_rows(path)
        picture_of: dict[str, int] = {}
        if source.image_key is not None:
            picture_of = {str(row.get(source.image_key)): number for number, row in enumerate(rows)}
        for number, row in enumerate(rows, 2):
            image = row.get("image")
            if picture_of and image is not None and len(image) <= _REFERENCE_LENGTH:
                if image not in picture_of:
                    raise DataError(f"{path}:{number}: image refers to row {image!r}, which does not exist")
                row["image"] = rows[picture_of[image]].get("image")
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
    other: dict[str, Row] = {}
    if source.join is not None:
        paths = _config_files(place, source.join.path, source.join.split or str(source.split))
        if not paths:
            raise ConfigError(f"{source.name}: no parquet file of {source.join.path!r} in {place}")
        other = _by_key((row for path in paths for row in _parquet_rows(path)), source.join, source.join.path)
    for path, fields in files:
        for row in _parquet_rows(path):
            partner = other.get(str(row.get(source.join.by)), {}) if source.join is not None else {}
            yield {**partner, **row, **fields, "_file": path.stem}


def _parquet_rows(path: Path) -> Iterator[Row]:
    return stored_rows(open_files([path], where="benchmark"), path.name, path.parent)


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


def _read_reasonseg(source: SourceSpec, files: Sequence[tuple[Path, Row]], place: Path) -> Iterator[Row]:
    """One row a picture: its file, sentences (``text``), ``is_sentence`` and annotation."""
    for path, fields in files:
        try:
            found = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
            row = {
                "text": found["text"],
                "is_sentence": bool(found["is_sentence"]),
                "annotation": {"shapes": found["shapes"]},
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no annotation of ReasonSeg ({type(error).__name__}: {error})") from None
        image = str(path.with_suffix(".jpg").relative_to(place))
        yield {**row, "image": image, **fields, "_file": path.stem}


def _from_hub(task: TaskSpec, source: SourceSpec) -> Iterator[Row]:
    for config in source.configs or [None]:
        table = _hub_table(task, source, config, str(source.split))
        other: dict[str, Row] = {}
        if (join := source.join) is not None:
            second = _hub_table(task, source, join.path, join.split or str(source.split))
            other = _by_key(stored_rows(second, join.path), join, join.path)
        for row in stored_rows(table, config or str(source.hub)):
            partner = other.get(str(row.get(join.by)), {}) if join is not None else {}
            yield {**partner, **row, "_config": config or "default", "_file": config or ""}


def _hub_table(task: TaskSpec, source: SourceSpec, config: str | None, split: str) -> Any:
    try:
        return open_hub(str(source.hub), config, split=split, revision=source.revision, where=task.name)
    except DataError as error:
        raise UnavailableError(f"{error}. {whereabouts(task)}") from None


_FORMATS: dict[str, Callable[[SourceSpec, Sequence[tuple[Path, Row]], Path], Iterator[Row]]] = {
    "json": _read_json_source, "jsonl": _read_text, "tsv": _read_text, "csv": _read_text, "parquet": _read_parquet,
    "hub": _read_parquet, "mme": _read_mme, "refer": _read_refer, "reasonseg": _read_reasonseg,
}  # fmt: skip
