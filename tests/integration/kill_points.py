"""At which moment is a training process killed? A recipe plugin writes the answer into every process of the run.

File operations are counted by an audit hook, so a kill falls exactly between two of them: after the tensors of a
checkpoint but before its manifest, in the middle of an export, between two stages.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm.recipe import Recipe
from mllm.train.launch import PRELOADED

_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "os.truncate")


def plugin(folder: Path) -> str:
    """A plugin for a recipe: kills the process at the moment that ``aim`` told, and nothing before it was called."""
    path = folder / "kill_points_plugin.py"
    path.write_text(f"from tests.integration.kill_points import arm\narm({str(folder)!r})\n")
    return str(path)


def aim(folder: Path, output: Path, pattern: str, *, after: int = 0, half: bool = False, process: int = 0) -> None:
    """The next run dies before the ``after``-th file operation in ``output`` that follows the first one whose line
    (``os.rename from to``) holds ``pattern``; half: what that operation's file holds is cut in half first."""
    wish = {"output": str(output), "pattern": pattern, "after": after, "half": half, "process": process}
    (folder / "kill.json").write_text(json.dumps(wish))


def spare(folder: Path) -> None:
    """The next run lives."""
    (folder / "kill.json").unlink(missing_ok=True)


def arm(folder: str) -> None:
    """Called by the plugin in every process of the run; the one that started the others is left alone."""
    path = Path(folder) / "kill.json"
    if multiprocessing.parent_process() is None or not path.is_file():
        return
    wish = json.loads(path.read_text())
    if int(os.environ.get("RANK", "0")) == wish["process"]:
        sys.addaudithook(_Hook(wish))


class _Hook:
    def __init__(self, wish: dict[str, Any]):
        self.wish, self.pattern, self.owner = wish, re.compile(wish["pattern"]), os.getpid()
        self.passed: int | None = None
        self.done = False

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in _FILE_EVENTS or os.getpid() != self.owner or self.done:  # a data worker inherits the hook
            return
        line = " ".join([event, *(str(a) for a in arguments[: 2 if event in ("os.rename", "os.link") else 1])])
        removes = event in ("os.remove", "os.rmdir")  # named within a folder that is open already
        if self.wish["output"] not in line and not (removes and self.passed is not None):
            return
        if self.passed is not None:
            self.passed += 1
        elif self.pattern.search(line):
            self.passed = 0
        if self.passed is None or self.passed < self.wish["after"]:
            return
        self.done = True
        if self.wish["half"]:
            os.truncate(arguments[0], Path(arguments[0]).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def run(recipe: Recipe, output: Path, *, resume: bool) -> int:
    """Train in one process; its exit code, -9 when it was killed."""
    return in_a_process(_train, recipe, output, resume)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> int:
    """Call a function in a process forked from a server that has imported everything; the process's exit code."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    child = context.Process(target=function, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def _train(recipe: Recipe, output: Path, resume: bool) -> None:
    from mllm.train import run_recipe

    run_recipe(recipe, output=output, resume=resume)
