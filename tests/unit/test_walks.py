"""Can a reader walk the code as docs/concepts/walks.md says, and through as few files?"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/concepts/walks.md"
STEP = re.compile(r"^\d+\. `([\w.]+):([\w.]+)`(?:, `([^`]+)`)?( \(.+\))?$", re.M)
NUMBER = re.compile(r"^(\d+) files\.$", re.M)


class Step(NamedTuple):
    module: str
    name: str
    call: str
    """How a file opened before writes it; empty: something else calls."""

    @property
    def path(self) -> Path:
        return ROOT / (self.module.replace(".", "/") + ".py")


class Walk(NamedTuple):
    title: str
    number: int
    steps: list[Step]


def walks() -> list[Walk]:
    found = []
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        rows = STEP.findall(section)
        assert len(rows) == len(re.findall(r"^\d+\. ", section, re.M)), "a step that cannot be read"
        steps = [
            Step(module, name, "" if not place or who else call or name.rpartition(".")[2])
            for place, (module, name, call, who) in enumerate(rows)
        ]
        number = NUMBER.search(section)
        assert number is not None, section
        found.append(Walk(section.partition("\n")[0], int(number[1]), steps))
    return found


def names_of(path: Path) -> set[str]:
    """Functions and methods of a file, as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def gaps(steps: list[Step]) -> list[str]:
    """Steps that are not there, or that no file opened before calls."""
    found, opened = [], ""
    for step in steps:
        if not step.path.is_file() or step.name not in names_of(step.path):
            found.append(f"{step.module}:{step.name} is not there")
            continue
        defined = f"def {step.call}"
        if step.call and not re.search(rf"(?<![\w]){re.escape(step.call)}", opened.replace(defined, "")):
            found.append(f"{step.module}:{step.name}: no file before it says {step.call}")
        if (text := step.path.read_text(encoding="utf-8")) not in opened:
            opened += text
    return found


@pytest.mark.parametrize("walk", walks(), ids=lambda walk: walk.title)
def test_a_walk_leads_from_file_to_file_through_as_many_as_it_says(walk: Walk):
    assert gaps(walk.steps) == []
    assert len({step.path for step in walk.steps}) == walk.number


def test_a_step_that_nothing_calls_is_found():
    steps = [
        Step("mllm.recipe", "load_recipe", ""),
        Step("mllm.eval.run", "run_eval", "run_eval"),
        Step("mllm.eval.run", "nobody", ""),
    ]
    assert gaps(steps) == [
        "mllm.eval.run:run_eval: no file before it says run_eval",
        "mllm.eval.run:nobody is not there",
    ]
