"""How does a task's YAML speak about the fields of a row: expressions and prompt templates?"""

from __future__ import annotations

import ast
import csv
import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mllm.errors import DataError, did_you_mean
from mllm.eval.data.pictures import Frames, from_base64
from mllm.types import IMAGE_MARK


def literal(value: Any) -> Any:
    """The list or number that a text spells (``"['a', 'b']"``); anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def as_list(value: Any) -> list[Any]:
    """A list as it is, None as ``[]``, anything else as a list of one; a text that spells a list is read."""
    value = literal(value) if isinstance(value, str) and value.strip().startswith("[") else value
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def letter(value: Any) -> str:
    """``0 → A``. A letter stays."""
    text = str(value).strip()
    return string.ascii_uppercase[int(text)] if text.isdigit() else text


def lettered(options: Sequence[Any], style: str = "{letter}. {text}", joiner: str = "\n") -> str:
    """Options one a line, ``A. text``."""
    return joiner.join(style.format(letter=string.ascii_uppercase[k], text=text) for k, text in enumerate(options))


_OPTION = re.compile(r"(?<![^\W_])\(?([A-Za-z])[).:．]\s*+")


def options_in(text: Any) -> list[str]:
    """Texts of the options that a text lists from A on, ``(a) x (b) y`` or ``A. x`` line by line; empty when there are not
    two. The last one ends with its line."""
    text, found = str(text), []
    for mark in _OPTION.finditer(text):
        alike = not found or (mark[1].islower(), mark[0][0] == "(") == (found[0][1].islower(), found[0][0][0] == "(")
        if alike and mark[1].upper() == string.ascii_uppercase[len(found) % 26]:
            found.append(mark)
    ends = [mark.start() for mark in found[1:]] + [len(text)]
    texts = [text[mark.end() : end].strip() for mark, end in zip(found, ends)]
    return (
        [*(one.rstrip(";,").strip() for one in texts[:-1]), texts[-1].split("\n")[0].strip()] if len(found) > 1 else []
    )


def stem_of(text: Any) -> str:
    """What stands before the options that `options_in` finds; the whole text where it finds none."""
    text = str(text)
    if not options_in(text):
        return text.strip()
    return text[: next(mark.start() for mark in _OPTION.finditer(text) if mark[1].upper() == "A")].strip()


def files(pattern: Any, folder: Path) -> list[str]:
    """Files that a pattern finds in the benchmark's folder, by the numbers in their names (page 2 before page 10)."""
    found = [str(path.relative_to(folder)) for path in Path(folder).glob(str(pattern))]
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def spell(values: Sequence[Any], pattern: str) -> list[str]:
    """Each value in the place of ``{}``: page ids as file names."""
    return [pattern.format(value) for value in values]


def text_file(path: Any, folder: Path) -> str:
    """Text of a file in the benchmark's folder. Raises `DataError`."""
    place = Path(folder) / str(path)
    try:
        return place.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({error})") from None


def table_text(text: Any) -> str:
    """A table (comma or tab separated, ``\\t`` and ``\\n`` also written out) in DePlot's form: a line a row, cells parted by
    `` | ``."""
    plain = str(text).replace("\\t", "\t").replace("\\n", "\n").strip()
    mark = "\t" if "\t" in plain else ","
    rows = csv.reader(plain.splitlines(), delimiter=mark)
    return "\n".join(" | ".join(cell.strip() for cell in row) for row in rows if any(cell.strip() for cell in row))


def fields(row: Mapping[str, Any]) -> str:
    """The texts of a row's own fields in the order of their names, joined by spaces; empty ones left out."""
    return " ".join(str(row[name]) for name in sorted(row) if not str(name).startswith("_") and row[name])


def present(values: Sequence[Any]) -> list[Any]:
    """Entries that are neither None, NaN nor empty."""
    return [
        value
        for value in values
        if value is not None and value == value and str(value).strip().lower() not in ("", "nan")
    ]


def video(
    path: Any, frames: int, start: float | None = None, end: float | None = None, fps: float | None = None
) -> Frames:
    """Frames of a video file or frame folder, relative to the benchmark's folder, between two times in seconds."""
    return Frames(Path(str(path)), int(frames), start, end, fps)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {
        "literal": literal, "as_list": as_list, "letter": letter, "lettered": lettered, "present": present,
        "from_base64": from_base64, "video": video, "options_in": options_in, "stem_of": stem_of, "files": files, "spell": spell,
        "text_file": text_file, "table_text": table_text, "fields": fields,
    }  # fmt: skip
    return environment


@lru_cache(maxsize=1024)
def _expression(text: str) -> Any:
    return _environment().compile_expression(text, undefined_to_none=False)


@lru_cache(maxsize=256)
def _template(text: str) -> Any:
    return _environment().from_string(text)


def check_expression(text: str, name: str) -> None:
    """Raises ValueError when ``text`` is no Jinja expression."""
    try:
        _expression(text)
    except TemplateError as error:
        raise ValueError(f"{name}: {text!r} is not a Jinja expression ({error})") from None


def check_template(text: str) -> None:
    """Raises ValueError when ``text`` is no Jinja template."""
    try:
        _template(text)
    except TemplateError as error:
        raise ValueError(f"not a Jinja template ({error})") from None


def evaluate(text: str, row: Mapping[str, Any], name: str) -> Any:
    """Value of an expression over a row. Raises `DataError` naming the column and what the row does have."""
    if text in row:  # a bare field name, the common case: no need for a template engine
        return row[text]
    try:
        value = _expression(text)(**{str(k): v for k, v in row.items()}, row=row)
        if not isinstance(value, Undefined):
            return value
        problem = str(value._undefined_message)
    except UndefinedError as error:
        problem = str(error)
    except DataError as error:
        raise DataError(f"column {name} ({text}): {error}") from None
    except Exception as error:
        raise DataError(f"column {name} ({text}): {type(error).__name__}: {error}") from None
    fields = [str(key) for key in row if not str(key).startswith("_")]
    hint = did_you_mean(text, fields)
    raise DataError(f"column {name} ({text}): {problem}{hint}; the row's fields: {', '.join(fields)}")


def render(text: str, values: Mapping[str, Any]) -> str:
    """The rendered prompt. Raises `DataError` when it names a value that is not there."""
    try:
        return _template(text).render(**values)
    except UndefinedError as error:
        raise DataError(f"prompt: {error}; values: {', '.join(values)}") from None


def clean(text: str) -> str:
    """User text without the character that marks image places."""
    return text.replace(IMAGE_MARK[0], "")
