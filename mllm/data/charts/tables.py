"""Which tables are there to draw: files in a folder, or data frames inside an installed Python package?"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Every table of a file, a folder or ``package:NAME``, in order of their names.

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
    found = [_table_file(path, root) for path in files if path.is_file() and _suffix(path) in READ]
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
            return pd.read_parquet(table.path)
        if kind == "r":
            return _read_r(table.path)
        return pd.read_csv(table.path, sep="\t" if kind == "tsv" else ",")
    except UnavailableError:
        raise
    except Exception as error:  # readers raise whatever they like; the table is named and counted
        raise DataError(f"cannot be read ({type(error).__name__})") from error


def require_pandas() -> None:
    """Raises `UnavailableError` where the extra is missing."""
    for module in ("pandas", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise UnavailableError(f"charts need {module}: {install_hint('charts')}")


def _table_file(path: Path, root: Path) -> TableFile:
    inner = path.relative_to(root).parent.as_posix() if root.is_dir() else "."
    return TableFile(source=root.name if inner == "." else inner, name=path.name.split(".")[0], path=path)


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

    frames = [value for value in rdata.read_rda(path).values() if isinstance(value, pd.DataFrame)]
    if not frames:
        raise DataError("holds no data frame")
    return frames[0]


def pickled(root: Path) -> Iterator[tuple[Path, Path]]:
    """(file, path without suffix below ``root``) of a package's pickles."""
    for path in sorted(root.rglob("*")):
        suffix = next((suffix for suffix in PICKLES if path.name.lower().endswith(suffix)), None)
        if suffix and path.is_file():
            inner = path.relative_to(root)
            parts = [part for part in inner.parent.parts if not part.startswith("_")]
            yield path, Path(*parts, path.name[: -len(suffix)])
