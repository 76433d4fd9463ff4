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
from mllm.progress import phase, tell
from mllm.recipe import Recipe
from mllm.train.checkpoint.own_folders import OwnFolders
from mllm.train.checkpoint.resume import difference
from mllm.train.data import open_mixture
from mllm.train.observe.run_info import git_state, package_versions

_SEEN = ".seen-by-all"
_SEEING_SECONDS = 20.0
_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}


def agree(recipe: Recipe, folder: Path) -> OwnFolders | None:
    """Compare commit, recipe, versions and data over the machines of this run, and see whether all of them see ``folder``.

    All processes must call it. Raises `ConfigError`, the same on each, naming the machine and what differs. One machine: nothing
    is done. Returns what completes the machines' folders where each has one of its own, None where they share one.
    """
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    places = distributed.gather_objects((socket.gethostname(), leads))
    if sum(leading for _, leading in places) < 2:
        return None
    with phase("comparing the machines"):
        gathered = distributed.gather_objects(facts(recipe) if leads else None)
        everyone = [
            (f"machine {number} ({host})", about)
            for number, ((host, _), about) in enumerate(
                (place, about) for place, about in zip(places, gathered) if about is not None
            )
        ]
        _refuse(unlike(everyone))
        names, sight = [name for name, _ in everyone], _sight(folder, leads)
        problem = shared_by_some(sight, names)
        _refuse(None if problem is None else f"output {folder}: {problem}")
        if len(sight[0]) == len(names):
            return None
    own = OwnFolders()
    distributed.keep_own_folders(own.here)
    kept = "" if recipe.mirror else "; mirror=s3://… keeps them all in one place too"
    tell(
        f"output {folder} is on each machine a folder of its own, with what its own processes write of a checkpoint: --resume needs "
        f"the folders of all {len(names)} machines{kept}"
    )
    return own


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


def _sight(folder: Path, leads: bool) -> dict[int, set[int]]:
    """Of every machine, whose files of ``folder`` it sees, its own among them; machines by number."""
    tokens = distributed.gather_objects(uuid.uuid4().hex if leads else None)
    rank = distributed.rank()
    if leads:
        (folder / f"{_SEEN}-{rank}").write_text(tokens[rank], encoding="utf-8")
    distributed.barrier()
    wanted = {number: token for number, token in enumerate(tokens) if token is not None}
    seen = distributed.gather_objects(_seen(folder, wanted, rank) if leads else None)
    if leads:
        (folder / f"{_SEEN}-{rank}").unlink(missing_ok=True)
    machine = {leader: number for number, leader in enumerate(wanted)}
    return {machine[leader]: {machine[other] for other in seen[leader] or ()} for leader in wanted}


def shared_by_some(sight: dict[int, set[int]], names: list[str]) -> str | None:
    """Which machine does not see what others share, in a sentence; None where all share the folder, or each has its own."""
    if {len(seen) for seen in sight.values()} in ({len(sight)}, {1}):
        return None
    alone = min(sight, key=lambda number: (len(sight[number]), -number))
    most = max(sight.values(), key=len)
    hidden = min(most - sight[alone])
    sharing = " and ".join(names[number] for number in sorted(most - {alone}))
    return (
        f"{names[alone]} does not see what {names[hidden]} writes there, while {sharing} share it. Either all share it "
        "(--output /shared/…), or each has its own"
    )


def _seen(folder: Path, tokens: dict[int, str], rank: int) -> set[int]:
    """Whose token is there. Network file systems may take some seconds to show a new file; a disk shows it at once."""
    end = time.monotonic() + (1.0 if _is_disk(folder) else _SEEING_SECONDS)
    seen = {rank}
    while len(seen) < len(tokens) and time.monotonic() < end:
        for number in tokens.keys() - seen:
            with contextlib.suppress(OSError):
                if (folder / f"{_SEEN}-{number}").read_text(encoding="utf-8") == tokens[number]:
                    seen.add(number)
        time.sleep(0.1)
    return seen


def _is_disk(folder: Path) -> bool:
    """Whether a folder is on a disk of this machine, as the system's table of mounts says."""
    try:
        lines = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    place = folder.resolve()
    over = [(len(at), kind) for _, at, kind, *_ in lines if place.is_relative_to(at)]
    return bool(over) and max(over)[1] in _DISKS


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
