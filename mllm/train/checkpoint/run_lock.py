"""Is another run writing this output folder at the moment?"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mllm.errors import ConfigError

FILE = ".run.lock"


@contextmanager
def only_run_in(folder: Path, *, asks: bool = True) -> Iterator[None]:
    """Keep other runs out of ``folder`` until the block ends or the process does, however it ends.

    A POSIX record lock: the system releases it when the process is gone, forked workers do not hold it on, and it reaches other
    machines where the file system's locks do. Where there are none, nothing is kept out. asks: one process of a run does, for all that
    write there. Raises `ConfigError` naming host and process of the run that has the folder.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        fcntl = None
    if fcntl is None or not asks:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError(_taken(folder, file.read())) from None
            if not _is_file(path, file.fileno()):
                continue  # the run that had it has just ended and taken the file away
            _write_owner(file)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_file(path: Path, opened: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False


def _write_owner(file: TextIO) -> None:
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file.truncate(0)
    file.write(json.dumps(owner))
    file.flush()


def _taken(folder: Path, text: str) -> str:
    try:
        owner = json.loads(text)
        who = f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it has just begun
        who = "another process"
    return (
        f"output {folder} is being written by another run ({who}); choose another with output=…, or end that run first"
    )
