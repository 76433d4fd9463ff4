"""Which exceptions does the toolkit raise for a user to read?"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class MllmError(Exception):
    """Base of every error a user can cause and cure."""

    told_by = ""
    """Of an error that every process of a run has: the variable (RANK, LOCAL_RANK) that is 0 where it is shown."""


class Interrupted(BaseException):
    """Ctrl-C while something long ran; the message says what is saved and how to go on. Not an `Exception`: nothing that mends
    single samples or steps may swallow it."""


class ConfigError(MllmError, ValueError):
    """A key or value of a recipe, dataset, task or component config is wrong; the message starts with its path."""


class UnknownName(ConfigError):
    """A name that nothing is registered under."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        self.kind, self.name, self.known = kind, name, sorted(known)
        meant = did_you_mean(name, self.known) or "."
        super().__init__(f"unknown {kind} {name!r}{meant} Known: {', '.join(self.known) or '-'}")


class AlignmentError(MllmError, ValueError):
    """Placeholders, images and features do not match in number; the message holds both numbers."""


class DataError(MllmError, ValueError):
    """A sample or file cannot be used; the message names it."""


class MissingFile(DataError):
    """A file that a sample names is not there."""


class CheckpointError(MllmError, RuntimeError):
    """A checkpoint is incomplete, foreign or of another architecture."""


class UnavailableError(MllmError, RuntimeError):
    """A feature was asked for that this installation lacks; the message says what to install or change."""


class GpuFull(MllmError, RuntimeError):
    """A GPU has no memory left; the message says which, who holds it, and what takes less."""


@contextlib.contextmanager
def blamed_on(where: str) -> Iterator[None]:
    """Whatever is raised inside is one sample's fault and ends no run: `DataError` that opens with ``where``.

    `DataError` and `AlignmentError` pass, since they name the sample themselves; so do `UnavailableError` and MemoryError,
    which no other sample would be spared.
    """
    try:
        yield
    except (DataError, AlignmentError, UnavailableError, MemoryError):
        raise
    except Exception as error:  # tokenizers, templates and table readers raise whatever they like
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, MllmError) else f"{type(error).__name__}: "
        raise DataError(f"{where}: {kind}{text[:300]}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` when something close exists, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
