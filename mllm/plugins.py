"""How do third-party components get registered, in this process and in those that it starts?

Three ways in: the entry-point group ``mllm.plugins`` of installed packages, a recipe's ``plugins:``, and files or modules that
the user names (``--plugin``, `use_plugins`, ``$MLLM_PLUGINS``). Code that travels inside a checkpoint is a fourth, and runs only
where the user allows it: `mllm.checkpoint_code`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mllm.errors import ConfigError

VARIABLE = "MLLM_PLUGINS"
"""Environment variable: plug-in files and modules, separated as in $PATH. Inherited by every process started from here."""
_PREFIX = "mllm_plugin_"


class LoadedFile(NamedTuple):
    """A plug-in file as it was when it was loaded; it may have been edited since."""

    path: Path
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


_loaded: set[str] = set()
_files: dict[str, LoadedFile] = {}
"""Module name of a loaded plug-in file → the file."""
_waiting: set[str] = set()
"""What is being imported right now: a plug-in may look names up while it registers its own."""
_seen: str | None = None
"""Value of the variable that was loaded last; None before the first time."""


def use_plugins(modules: Iterable[str]) -> None:
    """Make plug-ins known to this process and to every process that it starts. They are imported when a name is first looked up.

    Args:
        modules: dotted names or ``.py`` files.

    Raises:
        ConfigError: a file is not there.
    """
    known = _named()
    for module in modules:
        if module.endswith(".py"):
            module = str(_existing(module).absolute())  # the hub's cache links to files without a suffix: links stay
        if os.pathsep in module:
            raise ConfigError(
                f"plugins: {module} holds a {os.pathsep!r}, which separates plug-ins in ${VARIABLE}; rename it"
            )
        if module not in known:
            known.append(module)
    if known:
        os.environ[VARIABLE] = os.pathsep.join(known)


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Import every entry point of group ``mllm.plugins``, what ``$MLLM_PLUGINS`` names and the given modules (dotted names or
    ``.py`` files), once each. A file is known by its content: a copy of a loaded one is not loaded again.

    Raises `ConfigError` naming the plugin that does not import.
    """
    global _seen
    value = os.environ.get(VARIABLE, "")
    if value != _seen:
        for point in entry_points(group="mllm.plugins") if _seen is None else ():
            _load(point.value)
        for module in _named():
            _load(module)
        _seen = value
    for module in modules:
        _load(module)


def copy_files(modules: Iterable[str], folder: Path) -> None:
    """Copy the plug-in files among ``modules`` (as they were loaded) to ``folder``; what lies there already stays."""
    by_path = {file.path: file.content for file in _files.values()}
    for path in (Path(module).expanduser().absolute() for module in modules if module.endswith(".py")):
        target = folder / path.name
        if not target.exists():
            target.write_bytes(by_path.get(path) or path.read_bytes())


def loaded_file(module: str) -> LoadedFile | None:
    """The plug-in file that a module (by its ``__name__``) was loaded from; None for any other module."""
    return _files.get(module)


def is_loaded(sha256: str) -> bool:
    """Whether a plug-in file of this content has been loaded, under whatever name."""
    return any(file.sha256 == sha256 for file in _files.values())


def code_hashes(classes: Iterable[type]) -> list[str]:
    """SHA-256 of every plug-in file that one of these classes is defined in: what a stored result depends on besides
    weights and settings."""
    return sorted({file.sha256 for cls in classes if (file := loaded_file(cls.__module__)) is not None})


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _named() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def _existing(module: str) -> Path:
    path = Path(module).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"plugins: no such file {module}" + ("" if path.is_absolute() else f" (seen from {Path.cwd()})")
        )
    return path


def load_source(name: str, content: bytes) -> None:
    """Run a plug-in whose text is at hand rather than a file. Raises `ConfigError` when it does not import."""
    _run(name, LoadedFile(Path(name), content))


def _load(module: str) -> None:
    if module.endswith(".py"):
        path = _existing(module).absolute()
        _run(module, LoadedFile(path, path.read_bytes()))
    else:
        _run(module, None)


def _run(module: str, source: LoadedFile | None) -> None:
    key = f"{_PREFIX}{source.path.stem}_{source.sha256[:8]}" if source is not None else module.partition(":")[0]
    if key in _loaded or key in _waiting or (source is not None and is_loaded(source.sha256)):
        return
    _waiting.add(key)
    try:
        if source is None:
            importlib.import_module(key)
        else:
            _execute(source, key)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"plugins: {module} does not import: {type(error).__name__}: {error}") from error
    finally:
        _waiting.discard(key)
    _loaded.add(key)


def _execute(source: LoadedFile, name: str) -> None:
    module = ModuleType(name)
    module.__file__ = str(source.path)
    sys.modules[name], _files[name] = module, source
    try:
        exec(compile(source.content, str(source.path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name], _files[name]
        raise
