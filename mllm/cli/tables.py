"""How are names shown so that they can be copied, however narrow the terminal?"""

from __future__ import annotations

from typing import Any


def table(*columns: str, names: tuple[str, ...] = ()) -> Any:
    """A rich table without borders. names: columns whose cells are never cut or broken over lines; the others are wrapped."""
    from rich.table import Column, Table

    heads = [
        Column(column, no_wrap=column in names, overflow="ignore" if column in names else "fold") for column in columns
    ]
    return Table(*heads, box=None, pad_edge=False)


def show(made: Any) -> None:
    """Print a table, wide enough for its names where the terminal is not, and as wide as it likes into a file or pipe."""
    from rich.console import Console

    console = Console()
    fixed = [column for column in made.columns if column.no_wrap]
    needed = sum(max(len(str(cell)) for cell in (column.header, *column.cells)) + 1 for column in fixed)
    room = needed + 12 * (len(made.columns) - len(fixed))
    if not console.is_terminal:
        room = max(room, 200)
    Console(width=max(console.width, room)).print(made, soft_wrap=True)
