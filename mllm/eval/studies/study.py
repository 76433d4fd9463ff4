"""How are the results of a study beside the scores (ablation, stress test, contamination) kept and shown?"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mllm.errors import DataError
from mllm.eval.predictions import write_atomic

_LONG = 16
"""A longer table is folded on the HTML page."""
NAMES = ("judges", "sensitivity", "budgets", "ablation", "ablations", "stress", "contamination")
"""Studies that a report shows when their files lie in its folder, in this order."""


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first ``num_text`` columns are words, the others numbers."""

    caption: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    num_text: int = 1


@dataclass(frozen=True)
class Study:
    """What a study found. notes: sentences a reader needs before the numbers; data: everything, JSON-ready."""

    name: str
    title: str
    notes: list[str]
    tables: list[Table]
    data: dict[str, Any] = field(default_factory=dict)


def save_study(study: Study, folder: str | Path) -> dict[str, Path]:
    """Write ``<name>.json`` and ``<name>.md`` into ``folder``. Returns their paths by suffix."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {suffix: folder / f"{study.name}.{suffix}" for suffix in ("json", "md")}
    write_atomic(paths["json"], json.dumps(finite(asdict(study)), indent=2, ensure_ascii=False) + "\n")
    write_atomic(paths["md"], "\n".join(study_markdown(study)) + "\n")
    return paths


def load_studies(folder: str | Path) -> list[Study]:
    """Studies whose files lie in ``folder``. Raises `DataError` for a file that is none."""
    studies = []
    for path in (Path(folder) / f"{name}.json" for name in NAMES):
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            tables = [
                Table(t["caption"], tuple(t["headings"]), [tuple(row) for row in t["rows"]], t["num_text"])
                for t in data["tables"]
            ]
            studies.append(Study(data["name"], data["title"], list(data["notes"]), tables, data["data"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no study can be read from it ({error!r}); remove it or run it again") from None
    return studies


def study_markdown(study: Study, *, level: int = 1) -> list[str]:
    """Lines of Markdown under a heading of ``level``."""
    lines = [f"{'#' * level} {study.title}", ""]
    lines += [f"- {note}" for note in study.notes]
    for table in study.tables:
        lines += ["", f"**{table.caption}**", "", *markdown_table(table.headings, table.rows)]
    return lines


def study_html(study: Study) -> str:
    """The study as an HTML fragment."""
    parts = [f'<h2 id="study-{study.name}">{html.escape(study.title)}</h2>']
    parts += [f"<p class=note>{html.escape(note)}</p>" for note in study.notes]
    for table in study.tables:
        headings = [f"<th{_kind(table, k)}>{html.escape(heading)}" for k, heading in enumerate(table.headings)]
        rows = [
            "<tr>" + "".join(f"<td{_kind(table, k)}>{html.escape(cell)}" for k, cell in enumerate(row))
            for row in table.rows
        ]
        body = f"<table><tr>{''.join(headings)}{''.join(rows)}</table>"
        caption = html.escape(table.caption)
        long = len(table.rows) > _LONG
        parts.append(f"<details><summary>{caption}</summary>{body}</details>" if long else f"<p>{caption}</p>{body}")
    return "".join(parts)


def _kind(table: Table, column: int) -> str:
    return "" if column < table.num_text else " class=n"


def print_study(study: Study, console: Console | None = None) -> None:
    """Tables, then notes, on the console."""
    console = console or Console()
    for table in study.tables:
        console.print(f"[italic]{escape(table.caption)}[/]", highlight=False)
        print_table(console, table.headings, table.rows, range(table.num_text))
        console.print()
    for note in study.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)


def print_table(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int]) -> None:
    """A table whose ``words`` columns are text and whose others are numbers. Where it is wider than the console, a
    row's words stand in a line above its numbers, so that no name is broken; a table of words alone is folded."""
    cells = [tuple(headings), *map(tuple, rows)]
    sizes = [max(len(row[k]) for row in cells) for k in range(len(headings))]
    numbers = [k for k in range(len(headings)) if k not in words]
    if not numbers and sum(sizes) + 2 * len(sizes) - 2 > console.width:
        shown = RichTable(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            shown.add_column(heading, overflow="fold")
        for row in rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        return

    def laid(row: Sequence[str], columns: Sequence[int]) -> str:
        return "  ".join(row[k].ljust(sizes[k]) if k in words else row[k].rjust(sizes[k]) for k in columns).rstrip()

    lines = [[laid(row, range(len(headings)))] for row in cells]
    if len(lines[0][0]) > console.width or any(len(line[0]) > console.width for line in lines):
        lines = [[" · ".join(row[k] for k in words), "  " + laid(row, numbers)] for row in cells]
    for position, line in enumerate(lines):
        for text in line:
            console.print(escape(text), highlight=False, soft_wrap=True, style="bold" if position == 0 else None)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(headings), line(["---"] * len(headings)), *(line(row) for row in rows)]


def number(value: float, digits: int = 2) -> str:
    """A number for people; – for NaN."""
    return "–" if value != value else f"{value:.{digits}f}"


def spread(low: float, high: float, *, digits: int = 2, sign: bool = False) -> str:
    """``low – high``, with signs ``low to high``; – for NaN."""
    if low != low or high != high:
        return "–"
    return f"{low:+.{digits}f} to {high:+.{digits}f}" if sign else f"{low:.{digits}f} – {high:.{digits}f}"


def p_text(value: float) -> str:
    """A p value for people."""
    return "–" if value != value else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def finite(value: Any) -> Any:
    """The same data with NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
