"""What exactly was run? `run.json`: code, packages, data, seeds, stages."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mllm
from mllm.config import to_plain
from mllm.recipe import Recipe

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "safetensors",
    "deepspeed",
    "peft",
    "accelerate",
    "datasets",
    "timm",
    "open_clip_torch",
    "numpy",
    "pillow",
)
FILE = "run.json"


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """Commit, whether files differ from it, and the hash of that difference; empty outside a repository."""
    folder = folder or Path(mllm.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain")
    if commit is None or status is None:
        return {}
    state: dict[str, Any] = {"commit": commit.strip(), "dirty": bool(status.strip())}
    if state["dirty"]:
        difference = git("diff", "HEAD") or ""
        state["diff_sha256"] = hashlib.sha256((difference + status).encode()).hexdigest()
    return state


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "mllm": mllm.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**versions, "torch": torch.__version__}  # with its build (+cpu, +cu130)


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class RunInfo:
    """`run.json` of one output folder; survives resuming. Written by one process only."""

    def __init__(self, output: Path, recipe: Recipe, *, processes: int, resume: bool):
        self.path = output / FILE
        self.data: dict[str, Any] = {}
        if resume and self.path.is_file():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
        self.data.setdefault("started", _now())
        self.data.setdefault("stages", {})
        self.data.setdefault("starts", [])
        self.data |= {
            "recipe": to_plain(recipe),
            "seed": recipe.seed,
            "git": git_state(),
            "packages": package_versions(),
            "machine": machine(),
        }
        self.data["starts"].append({"time": _now(), "processes": processes, "resumed": resume, "command": sys.argv[:]})
        self.write()

    def stage(self, name: str, **values: Any) -> None:
        """Add to a stage's record: data hashes, groups, steps, loss, time."""
        self.data["stages"].setdefault(name, {}).update(values)
        self.write()

    def set(self, **values: Any) -> None:
        self.data.update(values)
        self.write()

    def write(self) -> None:
        """Replace the file at once, never half."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.path)


def data_hashes(paths: Iterable[Path], *, limit: int = 1 << 30) -> dict[str, str]:
    """Path → hash of each local data file; files beyond ``limit`` bytes are told by size and time of change."""
    result = {}
    for path in sorted({p for p in paths if p.is_file()}):
        facts = path.stat()
        result[str(path)] = (
            file_hash(path) if facts.st_size <= limit else f"size {facts.st_size}, mtime {facts.st_mtime_ns}"
        )
    return result


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
