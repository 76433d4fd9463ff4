"""Do all machines of a run train the same thing, and do they see its folder?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from mllm import distributed
from mllm.config import to_plain
from mllm.errors import ConfigError, MllmError
from mllm.progress import phase
from mllm.recipe import Recipe
from mllm.train.checkpoint.resume import difference
from mllm.train.data import open_mixture
from mllm.train.observe.run_info import git_state, package_versions

_SEEN = ".seen-by-all"
_SEEING_SECONDS = 20.0


def agree(recipe: Recipe, folder: Path) -> None:
    """Compare commit, recipe, versions and data over the machines of this run, and see whether all of them see ``folder``.

    All processes must call it. Raises `ConfigError`, the same on each, naming the machine and what differs. One machine: nothing
    is done.
    """
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    places = distributed.gather_objects((socket.gethostname(), leads))
    if sum(leading for _, leading in places) < 2:
        return
    with phase("comparing the machines"):
        gathered = distributed.gather_objects(facts(recipe) if leads else None)
        everyone = [
            (f"machine {number} ({host})", about)
            for number, ((host, _), about) in enumerate(
                (place, about) for place, about in zip(places, gathered) if about is not None
            )
        ]
        _refuse(unlike(everyone))
        _refuse(_unseen(folder, [name for name, _ in everyone], leads))


def facts(recipe: Recipe) -> dict[str, Any]:
    """What must be equal on all machines: the code's commit, with local changes, the recipe, the packages, the stages' rows."""
    state = git_state()
    settings = to_plain(recipe)
    settings["stages"] = {stage["name"]: stage for stage in settings["stages"]}
    code = state.get("commit", "")
    if state.get("dirty"):
        code += f" with changes {state['diff_sha256'][:12]}"
    return {
        "commit": code,
        "recipe": json.dumps(settings, sort_keys=True),
        "versions": json.dumps(package_versions()),
        "data": json.dumps({stage.name: _rows_of(recipe, stage) for stage in recipe.stages}),
    }


def _rows_of(recipe: Recipe, stage: Any) -> Any:
    try:
        return open_mixture(stage, recipe.seed).fingerprints
    except MllmError as error:
        return f"cannot be read ({error})"


def unlike(everyone: list[tuple[str, dict[str, Any]]]) -> str | None:
    """What differs between machines (name, facts), in a sentence; None when nothing does."""
    first, wanted = everyone[0]
    for name, about in everyone[1:]:
        for key in ("commit", "versions", "recipe", "data"):
            if about[key] == wanted[key]:
                continue
            if key == "commit":
                ours, theirs = (value[key] or "no repository" for value in (wanted, about))
                return f"{name} runs the code of {theirs}, {first} that of {ours}. Bring both to one commit"
            changed = difference(wanted[key], about[key], words=(f"on {first}", f"on {name}"))
            if key == "recipe":
                hashes = (hashlib.sha256(value[key].encode()).hexdigest()[:8] for value in (wanted, about))
                changed = f"hash {' and '.join(hashes)}: {changed}"
            cure = {
                "versions": "Install the same packages on both",
                "recipe": "Give both the same recipe and overrides",
                "data": "Copy the same rows to both",
            }
            return f"the {key} of {name} and {first} differ ({changed}). {cure[key]}"
    return None


def _unseen(folder: Path, names: list[str], leads: bool) -> str | None:
    token = distributed.gather_objects(uuid.uuid4().hex)[0]
    path = folder / _SEEN
    if distributed.is_main():
        path.write_text(token, encoding="utf-8")
    distributed.barrier()
    seen = distributed.gather_objects(_is_seen(path, token) if leads else None)
    if distributed.is_main():
        path.unlink()
    blind = [name for name, sees in zip(names, (value for value in seen if value is not None)) if not sees]
    if not blind:
        return None
    return (
        f"output {folder}: {blind[0]} does not see what {names[0]} writes there. Checkpoints need a folder on a file system "
        "that all machines share: --output /shared/…"
    )


def _is_seen(path: Path, token: str) -> bool:
    """Network file systems may take some seconds to show a new file."""
    end = time.monotonic() + _SEEING_SECONDS
    while True:
        try:
            if path.read_text(encoding="utf-8") == token:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _refuse(problem: str | None) -> None:
    """The same error everywhere; the first process's is shown, and the others stay until it is, since launchers end all processes
    with the first."""
    if problem is None:
        return
    error = ConfigError(problem)
    error.told_by = "RANK"
    if not distributed.is_main():
        with contextlib.suppress(RuntimeError):  # it has ended
            distributed.barrier()
    raise error
