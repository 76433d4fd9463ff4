"""What exactly was run? `run.json`: code, packages, data, seeds, stages."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import mllm
from mllm.config import to_plain
from mllm.damage import read_json
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
_MOST_DIFF = 4 << 20


def git_state(folder: Path | None = None, *, keep: Path | None = None) -> dict[str, Any]:
    """Commit, whether files differ from it, and the hash of that difference; empty outside a repository. keep: where the
    difference of tracked files is written, whole up to a few megabytes, under the name that is returned as ``diff``."""
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
        if keep is not None:
            name = f"code-{state['diff_sha256'][:12]}.diff"
            (keep / name).write_text(difference[:_MOST_DIFF], encoding="utf-8")
            state["diff"] = name
    return state


def package_versions() -> dict[str, str]:
    import torch  # whoever only reads a run's file does without

    versions = {"python": platform.python_version(), "mllm": mllm.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**versions, "torch": torch.__version__}  # with its build (+cpu, +cu130)


def machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda}


class RunInfo:
    """`run.json` of one output folder; survives resuming. Written by one process only."""

    def __init__(self, output: Path, recipe: Recipe, *, processes: int, resume: bool):
        self.path = output / FILE
        self.data: dict[str, Any] = {}
        if resume and self.path.is_file():
            self.data = read_json(self.path)
        self.data.setdefault("started", _now())
        self.data.setdefault("stages", {})
        self.data.setdefault("starts", [])
        self.data |= {
            "recipe": to_plain(recipe),
            "seed": recipe.seed,
            "git": git_state(keep=output),
            "hub_revisions": hub_revisions(to_plain(recipe.model)),
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


def hub_revisions(settings: Any) -> dict[str, str]:
    """``id@revision`` → commit, for every hub repository that settings name and this machine has in its cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    result: dict[str, str] = {}
    if isinstance(settings, dict):
        revision = str(settings.get("revision") or "main")
        for name in (settings.get("source"), settings.get("tokenizer")):
            if isinstance(name, str) and name.count("/") == 1 and not Path(name).exists():
                name = name.removeprefix("hf-hub:")
                reference = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / revision
                if reference.is_file():
                    result[f"{name}@{revision}"] = reference.read_text(encoding="utf-8").strip()
                elif len(revision) == 40:
                    result[f"{name}@{revision}"] = revision
        for value in settings.values():
            result |= hub_revisions(value)
    elif isinstance(settings, list):
        for value in settings:
            result |= hub_revisions(value)
    return result


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
