"""How do third-party components get registered?"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from mllm.errors import ConfigError

_loaded: set[str] = set()


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Import every entry point of group ``mllm.plugins`` and the given modules (dotted names or ``.py`` files), once each.

    Raises `ConfigError` naming the plugin that does not import.
    """
    for point in entry_points(group="mllm.plugins"):
        _load(point.value)
    for module in modules:
        _load(module)


def _load(module: str) -> None:
    key = str(Path(module).resolve()) if module.endswith(".py") else module.partition(":")[0]
    if key in _loaded:
        return
    try:
        if module.endswith(".py"):
            path = Path(module)
            if not path.is_file():
                raise ConfigError(f"plugins: no such file {module}")
            specification = importlib.util.spec_from_file_location(f"mllm_plugin_{path.stem}", path)
            assert specification is not None and specification.loader is not None
            loaded = importlib.util.module_from_spec(specification)
            sys.modules[specification.name] = loaded
            specification.loader.exec_module(loaded)
        else:
            importlib.import_module(key)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"plugins: {module} does not import: {type(error).__name__}: {error}") from error
    _loaded.add(key)
