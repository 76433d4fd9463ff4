"""Who may read what was written? Whom the umask lets; safetensors and tempfile leave their own files to their owner alone."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def by_umask(*places: str | os.PathLike[str]) -> None:
    """Give files, and folders' ``*.safetensors``, the mode that other new files have. One that is another user's stays as it is."""
    mode = 0o666 & ~_umask()
    for place in map(Path, places):
        for path in place.glob("*.safetensors") if place.is_dir() else (place,):
            with contextlib.suppress(OSError):
                path.chmod(mode)


@contextlib.contextmanager
def whole_file(target: str | os.PathLike[str]) -> Iterator[Any]:
    """A binary file to write that has ``target``'s name when the block has ended well, and is gone otherwise; several processes may write
    the same, the last one counts. Raises `OSError`."""
    target = Path(target)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as half:
        try:
            yield half
        except BaseException:
            Path(half.name).unlink()
            raise
    by_umask(half.name)
    Path(half.name).replace(target)


def unreadable(folder: str | os.PathLike[str]) -> str | None:
    """Which weights below a checkpoint's folder this process may not read, and what to type; None where it may read all."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.exists() and not os.access(path, os.R_OK):
            found = path.stat()
            mode = stat.S_IMODE(found.st_mode)
            return (
                f"{path} belongs to user {found.st_uid} (mode {mode:o}), and user {os.getuid()} may not read it; its owner types: "
                f"chmod a+r {path.parent}/*.safetensors"
            )
    return None


def _umask() -> int:
    """Without setting it, which other threads would notice (Linux); else the usual one."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
