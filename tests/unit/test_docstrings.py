"""Do the docstrings of what the reference shows name every argument, what is returned and what is raised?

The site's generator reads Google's format: ``Args:``, ``Returns:``, ``Raises:``, each entry indented once.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mllm
from mllm import errors
from mllm.errors import DataError

REFERENCE = Path(__file__).resolve().parents[2] / "docs/reference/python.md"
SECTION = re.compile(r"^(Args|Returns|Raises):\n((?:    .*\n|\n)+)", re.M)
OWN = {"forward", "generate"}
"""Overridden methods whose arguments are ours to explain, whatever transformers and torch say of theirs."""


def public() -> dict[str, Callable[..., Any]]:
    """Path → function of everything on the page, and of what ``import mllm`` offers."""
    names = re.findall(r"^::: (mllm[\w.]+)$", REFERENCE.read_text(encoding="utf-8"), re.M)
    names += [f"{module}.{name}" for name, module in mllm._LAZY.items()]
    found: dict[str, Callable[..., Any]] = {}
    for name in names:
        for function in _functions(_named(name)):
            found[f"{function.__module__}.{function.__qualname__}"] = function
    return found


def _named(path: str) -> Any:
    parts, known = path.split("."), 0
    found: Any = None
    for known in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:known]))
            break
        except ModuleNotFoundError:
            continue
    for name in parts[known:]:
        found = getattr(found, name)
    return found


def _functions(thing: Any) -> Iterator[Callable[..., Any]]:
    if inspect.isfunction(thing):
        yield inspect.unwrap(thing)
    elif inspect.ismodule(thing):
        for name, value in vars(thing).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == thing.__name__:
                yield from _functions(value)
    elif inspect.isclass(thing):
        above = {name for base in thing.__mro__ if not base.__module__.startswith("mllm.") for name in vars(base)}
        for name, value in vars(thing).items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            shown = not name.startswith("_") and name != "tiny" and (name in OWN or name not in above)
            if shown and inspect.isfunction(function):
                yield inspect.unwrap(function)


def _raised(function: Callable[..., Any]) -> set[str]:
    """Our own errors that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return {name for name in names if hasattr(errors, name)}


def faults(function: Callable[..., Any]) -> list[str]:
    """What a function's docstring lacks, or names wrongly."""
    text = inspect.cleandoc(function.__doc__ or "") + "\n"
    sections = dict(SECTION.findall(text))
    said = {name: re.findall(r"^    (\w+): \S", body, re.M) for name, body in sections.items()}
    signature = inspect.signature(function)
    wanted = [name for name in signature.parameters if name not in ("self", "cls")]
    found = [] if text.strip() else ["has no docstring"]
    if said.get("Args", []) != wanted:
        found.append(f"Args are {said.get('Args', [])}, the function takes {wanted}")
    # An argument needs a result explained; a property-like method says it in its first sentence.
    if wanted and signature.return_annotation not in (None, "None") and not sections.get("Returns", "").strip():
        found.append("Returns is missing")
    if lacking := _raised(function) - set(said.get("Raises", [])):
        found.append(f"Raises does not name {', '.join(sorted(lacking))}")
    return found


def test_the_reference_explains_arguments_results_and_errors() -> None:
    functions = public()
    assert len(functions) > 60
    wrong = {name: found for name, function in functions.items() if (found := faults(function))}
    assert not wrong, "\n".join(f"{name}: {'; '.join(found)}" for name, found in wrong.items())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "has no docstring"),
        ("Sum.\n\nArgs:\n    a: first.\n\nReturns:\n    b.", "Args are ['a']"),
        ("Sum.\n\nArgs:\n    a: first.\n    b: second.\n    c: none.\n\nReturns:\n    b.", "'c']"),
        ("Sum.\n\nArgs:\n    a: first.\n    b: second.", "Returns is missing"),
        ("Sum.\n\nArgs:\n    a: first.\n    b: second.\n\nReturns:\n    b.", "Raises does not name DataError"),
    ],
)
def test_a_docstring_with_a_gap_is_found(text: str, fault: str) -> None:
    def add(a: int, b: int) -> int:
        if a < 0:
            raise DataError("negative")
        return a + b

    add.__doc__ = text
    assert any(fault in found for found in faults(add))
