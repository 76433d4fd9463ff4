"""Which tables are there to draw: files in a folder, or data frames inside an installed Python package?"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.install import install_hint, package_hint

PACKAGE = "package:"
READ = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".rdata": "r", ".rda": "r"}
"""Suffixes that are read as they are."""
PICKLES = (".pkl", ".pkl.compress", ".pickle")
"""Suffixes that only a package's own files may have: reading a pickle runs its code, as importing the package would."""
MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class TableFile:
    """One table to read. source: what the splits keep together (a subfolder or, in a package of packages, the inner one); name: the file's
    up to its first dot, which parts of one thing share (``Snow.deaths``, ``Snow.pumps``): they are in one split, and one cluster where
    scores are counted."""

    source: str
    name: str
    path: Path

    @property
    def id(self) -> str:
        return f"{self.source}/{self.name}"


def names_apart(tables: Sequence[TableFile]) -> list[str]:
    """A name of each that no other has: its id, its file where several have that id, its path where files are called alike too."""
    names = [table.id for table in tables]
    for longer in (lambda table: f"{table.source}/{table.path.name}", lambda table: str(table.path)):
        count = Counter(names)
        names = [name if count[name] == 1 else longer(table) for name, table in zip(names, tables, strict=True)]
    return names


def find_tables(place: str, cache: Path) -> list[TableFile]:
    """Every table of a file, a folder or ``package:NAME``, in order of their names; hidden files and folders (``.name``) are passed over.

    A package's pickles are read once, in a process of their own, and kept as parquet in ``cache``. Raises `ConfigError` for a
    place without tables, `UnavailableError` for a package that is not installed.
    """
    require_pandas()
    root = _package_folder(place.removeprefix(PACKAGE)) if place.startswith(PACKAGE) else Path(place).expanduser()
    if not root.exists():
        raise ConfigError(f"{place}: no such file or folder; give a folder, a table file, or package:NAME")
    if place.startswith(PACKAGE) and any(_suffix(path) in PICKLES for path in root.rglob("*")):
        root = _unpacked(root, cache)
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    found = [
        _table_file(path, root) for path in files if path.is_file() and _suffix(path) in READ and _shows(path, root)
    ]
    if not found:
        raise ConfigError(f"{place}: holds no table ({', '.join(sorted(READ))})")
    return found


def read_table(table: TableFile) -> Any:
    """The data frame of a file. Raises `DataError` with the reason why it cannot be read."""
    import pandas as pd

    if table.path.stat().st_size > MAX_BYTES:
        raise DataError(f"larger than {MAX_BYTES // 1_000_000} MB")
    kind = READ[_suffix(table.path)]
    try:
        if kind == "parquet":
            return _plain_numbers(pd.read_parquet(table.path))
        if kind == "r":
            return _read_r(table.path)
        return _read_text(table.path, "\t" if kind == "tsv" else ",")
    except (DataError, UnavailableError):
        raise
    except UnicodeDecodeError as error:
        raise DataError("cannot be read (not in UTF-8)") from error
    except Exception as error:  # readers raise whatever they like; the table is named and counted
        raise DataError(f"cannot be read ({type(error).__name__})") from error


def _read_text(path: Path, separator: str) -> Any:
    """A csv or tsv file. Raises `DataError` where its header is separated by something else, or shorter than its rows."""
    import pandas as pd

    with path.open(encoding="utf-8-sig") as handle:
        header = handle.readline()
    if header.count(";") > header.count(separator):
        raise DataError(f"columns separated by semicolons; save it with {'tabs' if separator == chr(9) else 'commas'}")
    frame = pd.read_csv(path, sep=separator)
    if frame.index.nlevels > 1:  # pandas takes what the header has no name for as an index
        raise DataError("rows of more cells than the header has")
    return frame


def _plain_numbers(frame: Any) -> Any:
    """A frame whose columns of decimals are floats."""
    from decimal import Decimal

    odd = [name for name in frame.columns if frame[name].dtype == object]
    decimals = [name for name in odd if {type(cell) for cell in frame[name].dropna()} == {Decimal}]
    return frame.astype(dict.fromkeys(decimals, float)) if decimals else frame


def require_pandas() -> None:
    """Raises `UnavailableError` where the extra is missing."""
    for module in ("pandas", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise UnavailableError(f"charts need {module}: {install_hint('charts')}")


def _table_file(path: Path, root: Path) -> TableFile:
    inner = path.relative_to(root).parent.as_posix() if root.is_dir() else "."
    return TableFile(source=root.name if inner == "." else inner, name=path.name.split(".")[0], path=path)


def _shows(path: Path, root: Path) -> bool:
    """Whether neither the file nor a folder below ``root`` is hidden: editors and systems leave copies of tables in those."""
    return path == root or not any(part.startswith(".") for part in path.relative_to(root).parts)


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in (*PICKLES, *READ) if name.endswith(suffix)), path.suffix.lower())


def _package_folder(package: str) -> Path:
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(f"package:{package}: not installed here; {package_hint(package)}")
    return Path(spec.submodule_search_locations[0])


def _unpacked(root: Path, cache: Path) -> Path:
    folder = cache / root.name
    if not (folder / "complete").is_file():
        command = [sys.executable, "-m", "mllm.data.charts.unpack", str(root), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"package {root.name}: its tables could not be unpacked: {done.stderr.strip()[-300:]}")
    return folder


def _read_r(path: Path) -> Any:
    import pandas as pd

    if importlib.util.find_spec("rdata") is None:
        raise UnavailableError(f"{path.name}: R's files need the rdata package: {install_hint('charts')}")
    rdata: Any = importlib.import_module("rdata")
    known = {**rdata.conversion.DEFAULT_CLASS_MAP, "Date": _times("D"), "POSIXct": _times("s")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that it gives as what they are made of, without the file's name
        held = rdata.read_rda(path, constructor_dict=known)
    frames = [value for value in held.values() if isinstance(value, pd.DataFrame)]
    if not frames:
        raise DataError("holds no data frame")
    return frames[0]


def _times(unit: str) -> Any:
    """How R's numbers of days or seconds become times; without it they are drawn as numbers."""
    import pandas as pd

    return lambda numbers, attributes: pd.to_datetime(np.asarray(numbers, float), unit=unit).to_numpy()


def pickled(root: Path) -> Iterator[tuple[Path, Path]]:
    """(file, path without suffix below ``root``) of a package's pickles."""
    for path in sorted(root.rglob("*")):
        suffix = next((suffix for suffix in PICKLES if path.name.lower().endswith(suffix)), None)
        if suffix and path.is_file():
            inner = path.relative_to(root)
            parts = [part for part in inner.parent.parts if not part.startswith("_")]
            yield path, Path(*parts, path.name[: -len(suffix)])
