"""How is a checkpoint's folder written whole or not at all?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mllm.damage import disk_full
from mllm.errors import ConfigError, UnavailableError

LAST = "config.json"
"""The file that makes a folder a checkpoint."""


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes ``target`` once the block ends; what is cut short, by an error, Ctrl-C or a kill, leaves no
    checkpoint there, which would stand in the way of the next try or be opened for a whole one.

    Args:
        target: the folder to make. Where it is there already, what was written is moved into it, ``config.json`` last.

    Yields:
        ``.writing-NAME`` beside it.

    Raises:
        ConfigError: the target is a file, or its folder cannot be written.
        UnavailableError: the disk is full.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; expected a folder to write")
    target = target.absolute()
    writing = target.with_name(f".writing-{target.name}")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield writing
        if not target.exists():
            writing.rename(target)
            return
        for path in sorted(writing.iterdir(), key=lambda path: path.name == LAST):
            place = target / path.name
            if path.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            path.replace(place)
    except Exception as error:
        if full := disk_full(error):
            raise UnavailableError(f"{target} was not written: {full}; make room, or choose another folder") from error
        raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)
