"""How does a killed run go on exactly where it was?

A checkpoint is a directory that is written under another name, closed with a manifest of sizes and hashes, and renamed:
it is complete or absent. It holds safetensors and JSON only. Weights and optimizer state are stored as runs of elements
by parameter name (`Fragment`), so a checkpoint fits any number of processes and any engine; with the same number it is
exact to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mllm import distributed
from mllm.errors import CheckpointError
from mllm.former_recipes import upgraded_model, upgraded_stage, withdrawn_from
from mllm.models.making import num_elements, shape_of
from mllm.recipe import ModelSpec, Recipe, StageSpec
from mllm.train.checkpoint.files import (
    DELETING,
    MANIFEST,
    WRITING,
    found,
    problem_of,
)
from mllm.train.engine.base import Engine, Fragment
from mllm.train.engine.shares import own_share, read_whole

FORMAT = 1
BESIDE = "beside.safetensors"
WEIGHTS = "weights"
COSMETIC = {
    "log_every",
    "save_every",
    "save_in_background",
    "keep_state",
    "num_workers",
    "draw",
    "max_bad_share",
    "max_tokens_per_batch",
    "frozen_encoders",
}
"""A stage's settings that change no weight, but for the rounding of sums: a run that was out of memory goes on with another."""
LENGTH = ("steps", "epochs")
"""A stage's settings that ``--extend`` may change."""


@dataclass
class Progress:
    """Where a stage is.

    step: optimizer steps done; samples: consumed by all processes; total_steps: the stage's length; frozen: fingerprint
    of the weights that do not learn; signature: the settings as JSON; extra: the data's place.
    """

    stage: str
    step: int = 0
    samples: int = 0
    total_steps: int = 0
    world_size: int = 1
    engine: str = "none"
    dtype: str = "float32"
    seed: int = 0
    frozen: str = ""
    signature: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


# Reading -----------------------------------------------------------------------------------------------------------


def latest_checkpoint(folder: Path) -> CheckpointReader | None:
    """The newest complete checkpoint in ``folder``, None without one. Remains of interrupted writes are removed.

    A damaged one (a missing, shortened or changed file) is passed over in favour of the one before it; when only
    damaged ones are there, `CheckpointError` says what is wrong with the newest.
    """
    if distributed.keeps_folder() and folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((WRITING, DELETING)):
                shutil.rmtree(path, ignore_errors=True)
    distributed.barrier()
    path, passed_over = newest_whole(folder)
    return None if path is None else CheckpointReader(path, passed_over)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """A stage's newest checkpoint that is as it was written, in the main process's eyes, and what is wrong with newer ones; None: the stage
    has none. Raises `CheckpointError` when all are damaged."""
    whole, problems = None, list[tuple[Path, str]]()
    for path in reversed(found(folder)) if distributed.is_main() else ():
        if (problem := problem_of(path)) is None:
            whole = path
            break
        problems.append((path, problem))
    whole, problems = distributed.gather_objects((whole, problems))[0]
    if problems and whole is None:
        path, problem = problems[0]
        raise CheckpointError(
            f"{path}: {problem}; no earlier checkpoint is complete. Delete {folder} to start the stage again"
        )
    return whole, [f"{path.name}: {text}" for path, text in problems]


class CheckpointReader:
    """A complete checkpoint. passed_over: newer, damaged ones."""

    def __init__(self, path: Path, passed_over: list[str] | None = None):
        self.path, self.passed_over = path, passed_over or []
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path}: written in format {manifest.get('format')}, this version reads {FORMAT}")
        self.progress = _read_progress(manifest["progress"])
        self._sources: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for index in sorted(path.glob("index-*.json")):
            owner = int(index.stem.rpartition("-")[2])
            for entry in json.loads(index.read_text(encoding="utf-8")):
                self._sources.setdefault(entry["name"], []).append((owner, entry))
        self._open: dict[tuple[int, int], Any] = {}

    def check(self, model: nn.Module, progress: Progress, *, longer: bool = False) -> None:
        """Raises `CheckpointError` when this checkpoint is not of this stage and model. longer: the stage's length may
        differ."""
        saved = self.progress
        changed = difference(saved.signature, progress.signature, leave_out=LENGTH if longer else ())
        if changed:
            raise CheckpointError(
                f"{self.path}: was written with other settings ({changed}); "
                "resume with the recipe it was started with, or give another output folder"
            )
        learning = {name: num_elements(p) for name, p in model.named_parameters() if p.requires_grad}
        stored = {name: sum(entry["length"] for _, entry in parts) for name, parts in self._sources.items()}
        wrong = sorted(n for n in {*learning, *stored} if learning.get(n) != stored.get(n))
        if wrong:
            raise CheckpointError(
                f"{self.path}: is of another architecture: {wrong[0]} has {stored.get(wrong[0], 'no')} elements there "
                f"and {learning.get(wrong[0], 'none')} here ({len(wrong)} parameters differ)"
            )
        if saved.frozen != progress.frozen:
            raise CheckpointError(
                f"{self.path}: the weights that do not learn in stage {saved.stage!r} are not those it was started "
                "with; was the previous stage's folder or the downloaded model changed?"
            )

    def restore_weights(self, model: nn.Module) -> None:
        """Copy learning weights and buffers into a model before its engine is built; casts as the engine would."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                share = own_share(parameter)
                _, start, length = share or (None, 0, parameter.numel())
                flat = torch.empty(length, dtype=torch.float32)
                self._read(name, WEIGHTS, start, flat)
                if share is None:
                    parameter.copy_(flat.view_as(parameter))
                else:
                    share[0][:length].copy_(flat)
            own = load_file(self._local(), device="cpu")
            buffers = dict(model.named_buffers())
            for key, value in own.items():
                if key.startswith("buffer."):
                    buffers[key.removeprefix("buffer.")].copy_(value)

    def restore_engine(self, engine: Engine) -> None:
        """Fill fp32 weights and optimizer state."""
        with torch.no_grad():
            engine.load_fragments(self._fill)
        self._open.clear()

    def _fill(self, fragment: Fragment) -> None:
        first = self._sources[fragment.name][0][1]
        self._read_into(fragment, WEIGHTS, fragment.flat)
        for key, saved in first["numbers"].items():
            value = saved["value"]
            device = fragment.like.device if fragment.like.is_cuda else "cpu"
            fragment.state[key] = (
                torch.tensor(float(value), dtype=torch.float32, device=device) if saved["tensor"] else value
            )
        for key, saved in first["tensors"].items():
            if key == WEIGHTS:
                continue
            owner = self._sources[fragment.name][0][0]
            if saved["whole"]:
                stored = self._file(owner, saved["file"]).get_tensor(f"{fragment.name}|{key}")
                fragment.state[key] = stored.to(fragment.like.device, copy=True)  # not a view of the mapped file
                continue
            if key not in fragment.state:
                kind = self._file(owner, saved["file"]).get_slice(f"{fragment.name}|{key}").get_dtype()
                # Moments that another optimizer kept in bf16 become float32 here.
                dtype = fragment.like.dtype if kind == "BF16" else _DTYPES[kind]
                fragment.state[key] = torch.zeros_like(fragment.like, dtype=dtype, requires_grad=False)
            state = fragment.state[key]
            flat = state.reshape(-1)  # a copy where channels are last
            self._read_into(fragment, key, flat)
            if not state.is_contiguous():
                state.copy_(flat.view_as(state))

    def _read_into(self, fragment: Fragment, key: str, destination: Tensor) -> None:
        part = torch.empty(fragment.length, dtype=destination.dtype)
        self._read(fragment.name, key, fragment.start, part)
        destination[fragment.offset : fragment.offset + fragment.length].copy_(part)

    def _read(self, name: str, key: str, start: int, destination: Tensor) -> None:
        """Fill ``destination`` with elements ``start`` … of a parameter's tensor, from whichever processes wrote
        them."""
        end = start + destination.numel()
        for owner, entry in self._sources[name]:
            low, high = max(start, entry["start"]), min(end, entry["start"] + entry["length"])
            if low < high:
                stored = self._file(owner, entry["tensors"][key]["file"]).get_slice(f"{name}|{key}")
                piece = stored[low - entry["start"] : high - entry["start"]]
                destination[low - start : high - start] = piece.to(destination.dtype)

    def _file(self, owner: int, number: int) -> Any:
        key = (owner, number)
        if key not in self._open:
            self._open[key] = safe_open(self.path / f"state-{owner:05d}-{number:04d}.safetensors", framework="pt")
        return self._open[key]

    def beside(self) -> dict[str, Tensor]:
        """What the stage kept besides its model."""
        path = self.path / BESIDE
        return load_file(path, device="cpu") if path.is_file() else {}

    def _local(self) -> Path:
        path = self.path / f"local-{distributed.rank():05d}.safetensors"
        return path if path.is_file() else self.path / "local-00000.safetensors"

    def restore_random(self, engine: Engine) -> bool:
        """Set every random generator; call it last, after the data loader was started. False: more processes than
        before, so this one has no state of its own and keeps its fresh one."""
        rank = distributed.rank()
        text = self.path / f"random-{rank:05d}.json"
        if self.progress.world_size != distributed.world_size() or not text.is_file():
            return False
        state = json.loads(text.read_text(encoding="utf-8"))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        own = load_file(self._local(), device="cpu")
        if "rng.cuda" in own and engine.device.type == "cuda":
            torch.cuda.set_rng_state(own["rng.cuda"], engine.device)
        torch.set_rng_state(own["rng.torch"])
        return True


def _read_progress(saved: dict[str, Any]) -> Progress:
    """A stage's place, also from a checkpoint whose settings are in an earlier dialect, or which was written before there was
    some setting: that one has its default."""
    progress = upgraded_stage(saved)
    with contextlib.suppress(ValueError, KeyError, TypeError):  # then it is compared as it is
        stage = upgraded_stage(json.loads(progress["signature"]))
        progress["signature"] = json.dumps(stage, sort_keys=True)
        used = withdrawn_from(stage)
        model, seed, rows = (stage.pop(key) for key in _BESIDE_STAGE)
        spec = ModelSpec.model_validate(upgraded_model(model))
        settings = json.loads(_settings(StageSpec.model_validate(stage), spec, seed, rows))
        progress["signature"] = json.dumps({**settings, **used}, sort_keys=True)
    return Progress(**progress)


def signature(recipe: Recipe, stage: StageSpec, rows: dict[str, str]) -> str:
    """What must be the same when a stage is resumed. rows: dataset → fingerprint of its rows."""
    return _settings(stage, recipe.model, recipe.seed, rows)


_BESIDE_STAGE = ("model", "seed", "rows")


def _settings(stage: StageSpec, model: ModelSpec, seed: int, rows: dict[str, str]) -> str:
    settings = stage.model_dump(mode="json", exclude=COSMETIC)
    for key in ("fused", "master", "moments"):  # how the update is computed and kept, not which
        settings["optimizer"].pop(key, None)
    return json.dumps({**settings, "model": model.model_dump(mode="json"), "seed": seed, "rows": rows}, sort_keys=True)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
}


def difference(
    saved: str, now: str, *, leave_out: Collection[str] = (), words: tuple[str, str] = ("then", "now")
) -> str:
    """``a.b: 1 then, 2 now`` for every setting of two JSON texts that differs; empty when none does."""
    if saved == now:
        return ""
    try:
        a, b = _flat(json.loads(saved)), _flat(json.loads(now))
    except ValueError:
        return "signature differs"
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k) and k not in leave_out]
    different = [f"{k}: {a.get(k)!r} {words[0]}, {b.get(k)!r} {words[1]}" for k in keys]
    return "; ".join(different[:8]) + (f" and {len(different) - 8} more" if len(different) > 8 else "")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return result


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights that do not learn: a changed bit, or two exchanged values, change it."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                with read_whole(parameter) as values:
                    total = _sum_of_bits(values.reshape(-1))
                digest.update(f"{name} {tuple(shape_of(parameter))} {total}\n".encode())
    return digest.hexdigest()


def _sum_of_bits(flat: Tensor) -> int:
    total, size = 0, flat.element_size()
    bits = flat.to(torch.int32) if size == 1 else flat.view(torch.int16 if size == 2 else torch.int32)
    for number, part in enumerate(bits.split(1 << 24)):
        places = torch.arange(1, part.numel() + 1, device=part.device, dtype=torch.int32)
        total += (number + 1) * int((part * places).sum(dtype=torch.int64))
    return total
