"""Does this recipe resume exactly on this machine? A short run is compared with one that is killed and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mllm
from mllm.errors import MllmError
from mllm.recipe import Recipe
from mllm.train.observe.tracking import read_metrics

COMPARED = ("loss", "grad_norm", "lr", "data", "samples", "tokens")


@dataclass
class ResumeReport:
    """compared: logged steps that both runs have; differences: one line for each value that is not equal bit for bit."""

    compared: int
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return self.compared > 0 and not self.differences


def verify_resume(
    recipe: Recipe, *, processes: int = 1, steps: int = 6, folder: str | Path | None = None, limit: float = 3600
) -> ResumeReport:
    """Train ``steps`` steps of every stage twice: whole, and killed (SIGKILL, every process) once in every stage.

    folder: where both runs go; default: a temporary one that is removed. Raises `MllmError` when a run fails by itself.
    """
    short = recipe.model_copy(deep=True)
    for stage in short.stages:
        data = stage.model_dump()
        data |= {"epochs": None, "steps": max(4, steps), "save_every": 2, "log_every": 1}
        short.stages[short.stages.index(stage)] = type(stage).model_validate(data)
    if folder is not None:
        return _verify(short, processes, Path(folder), limit)
    with tempfile.TemporaryDirectory(prefix="mllm-verify-") as temporary:
        return _verify(short, processes, Path(temporary), limit)


def _verify(recipe: Recipe, processes: int, folder: Path, limit: float) -> ResumeReport:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    whole, killed = folder / "whole", folder / "killed"
    _finish(_start(folder, whole, processes, resume=False), folder, limit)
    for number, stage in enumerate(recipe.stages):
        process = _start(folder, killed, processes, resume=number > 0)
        _kill_in(process, killed, stage.name, folder, limit)
    _finish(_start(folder, killed, processes, resume=True), folder, limit)
    return compare(read_metrics(whole), read_metrics(killed))


def compare(wanted: list[dict[str, Any]], found: list[dict[str, Any]]) -> ResumeReport:
    """What differs between two runs' records, floats compared bit for bit."""
    first = {(r["stage"], r["step"]): r for r in wanted}
    second = {(r["stage"], r["step"]): r for r in found}
    report = ResumeReport(len(first.keys() & second.keys()))
    for key in [*first, *(k for k in second if k not in first)]:
        if key not in first or key not in second:
            report.differences.append(
                f"{key[0]} step {key[1]}: only in the {'killed' if key in second else 'whole'} run"
            )
            continue
        for name in COMPARED:
            if first[key].get(name) != second[key].get(name):
                report.differences.append(
                    f"{key[0]} step {key[1]}: {name} is {first[key].get(name)!r} in the whole run and "
                    f"{second[key].get(name)!r} in the killed one"
                )
    return report


def _start(folder: Path, output: Path, processes: int, *, resume: bool) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "mllm.train.preflight.verify",
        str(folder / "recipe.json"),
        str(output),
        str(processes),
        str(int(resume)),
    ]
    paths = [str(Path(mllm.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}  # also from a bare checkout
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)


def _finish(process: subprocess.Popen, folder: Path, limit: float) -> None:
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise MllmError(
            f"verify-resume: the short run took longer than {limit:.0f} s; see {folder / 'log.txt'}"
        ) from None
    if code:
        raise MllmError(f"verify-resume: the short run failed:\n{_tail(folder)}")


def _kill_in(process: subprocess.Popen, output: Path, stage: str, folder: Path, limit: float) -> None:
    """SIGKILL the run and all its processes once three steps of a stage are logged (the last checkpoint is then at two)."""
    end = time.monotonic() + limit
    while not any(r["stage"] == stage and r["step"] >= 3 for r in read_metrics(output)):
        if process.poll() is not None:
            raise MllmError(f"verify-resume: the run ended before it could be killed:\n{_tail(folder)}")
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            raise MllmError(f"verify-resume: stage {stage} did not reach step 3 within {limit:.0f} s:\n{_tail(folder)}")
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]


if __name__ == "__main__":
    from mllm.train.run import run_recipe

    run_recipe(
        Recipe.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")),
        output=sys.argv[2],
        processes=int(sys.argv[3]),
        resume=bool(int(sys.argv[4])),
    )
