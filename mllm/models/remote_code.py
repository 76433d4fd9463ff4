"""How does a checkpoint open with ``trust_remote_code=True`` where this toolkit is not installed?

Its folder gets ``mllm_sources.py``, which holds the source of every module of ours that the model needs, as plain text, and a
``mllm_remote.py`` (`mllm.door`) that imports from it. An installed toolkit is used instead of the copy.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm.checkpoint_code import KEY
from mllm.door import CLASS_LINES, MODULE, SOURCES
from mllm.install import installed_version
from mllm.models.configuration_mllm import component_types

_ROOTS = (
    "mllm",
    "mllm.models.registration",
    "mllm.models.modeling_mllm",
    "mllm.processing.processor",
    "mllm.processing.chat",
)
_LEFT_OUT = (
    "mllm.cli",
    "mllm.train",
    "mllm.eval",
    "mllm.serve",
    "mllm.data",
    "mllm.demo",
    "mllm.testing",
)
"""Rooms that a model which is only opened never enters."""
_LOADER = '''"""Opens this checkpoint: with the toolkit mllm where it is installed, else with the copy of it beside this file."""

import importlib

{imports}
from .mllm_sources import install

install()
'''
_FINDER = '''

class _Copies(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `mllm` and its modules from SOURCES."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in SOURCES:
            return None
        packages = any(name.startswith(fullname + ".") for name in SOURCES)
        return importlib.util.spec_from_loader(fullname, self, origin=__file__, is_package=packages)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        module.__file__ = str(Path(__file__).parent.joinpath(*name.split("."))) + ".py"  # such a file there is not
        exec(compile(SOURCES[name], module.__file__, "exec"), module.__dict__)


def install():
    """Make `import mllm` work, from this file where the toolkit is not installed, and register its classes and plug-ins."""
    installed = importlib.util.find_spec("mllm")
    if installed is None or installed.loader is None:  # without a loader it is a folder that happens to have the name
        sys.meta_path.insert(0, _Copies())
    plugins = importlib.import_module("mllm.plugins")
    for name, source in PLUGINS.items():
        plugins.load_source(name, source.encode())
    importlib.import_module("mllm.models.registration").register()
'''


def write_remote_code(folder: str | Path) -> list[Path]:
    """Add the code to an exported checkpoint; returns the files written."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    needed = [part.registry.where(part.type).partition(":")[0] for part in component_types(config)]
    sources = collect_sources([*_ROOTS, *(name for name in needed if name.startswith("mllm."))])
    plugins = {e["file"]: (folder / e["file"]).read_text(encoding="utf-8") for e in config.get(KEY, ()) if "file" in e}
    packages = external_packages([*sources.values(), *plugins.values()])
    written = folder / SOURCES, folder / f"{MODULE}.py"
    header = f'"""mllm {installed_version()}, the modules that this checkpoint needs; written by `mllm export --remote-code`."""\n\n'
    imports = "import importlib\nimport importlib.abc\nimport importlib.util\nimport sys\nfrom pathlib import Path\n\n"
    tables = f"SOURCES = {_table(sources)}\nPLUGINS = {_table(plugins)}\n"
    written[0].write_text(header + imports + tables + _FINDER, encoding="utf-8")
    names = "\n".join(f"import {name}" for name in packages)
    written[1].write_text(_LOADER.format(imports=names) + CLASS_LINES, encoding="utf-8")
    return list(written)


def collect_sources(roots: Iterable[str]) -> dict[str, str]:
    """Module → source of every module of ours that ``roots`` import, at the top or inside functions, parents included."""
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name.startswith(_LEFT_OUT):
            continue
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # an attribute of a module, not a module
            continue
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin).read_text(encoding="utf-8")
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += [each for each in _imported(found[name]) if each.partition(".")[0] == "mllm"]
    return dict(sorted(found.items()))


def external_packages(sources: Iterable[str]) -> list[str]:
    """Packages that modules import at their top, outside ``try`` and ``if``: what must be installed."""
    names: set[str] = set()
    for source in sources:
        for node in ast.parse(source).body:
            names |= {name.partition(".")[0] for name in _names(node)}
    return sorted(names - set(sys.stdlib_module_names) - {"mllm", "__future__"})


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        yield from _names(node)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("mllm.models."):
            yield node.value.partition(":")[0]


def _names(node: Any) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def _table(texts: dict[str, str]) -> str:
    """A dict of texts as Python, the texts readable."""
    rows = (f"    {name!r}: {_literal(text)},\n" for name, text in texts.items())
    return "{\n" + "".join(rows) + "}\n"


def _literal(text: str) -> str:
    plain = "'''" not in text and not text.endswith(("'", "\\")) and "\r" not in text
    return f"r'''{text}'''" if plain else repr(text)
