"""How does a trained stage become a Hugging Face directory?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import yaml
from torch import nn

from mllm import distributed
from mllm.config import read_yaml, to_plain, validate
from mllm.damage import read_json
from mllm.errors import CheckpointError, ConfigError
from mllm.former_recipes import upgraded, withdrawn_from
from mllm.models import lora
from mllm.modes import by_umask
from mllm.plugins import copy_files
from mllm.recipe import Recipe, StageSpec
from mllm.train.checkpoint.files import found, sync_directory, sync_file
from mllm.train.checkpoint.resume import COSMETIC, difference
from mllm.train.engine.base import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DONE = "stage.json"


class Savable(Protocol):
    """What lies beside the weights: a processor, or what a stage without one found out."""

    def save_pretrained(self, save_directory: Any, /) -> Any: ...


def save_stage(
    engine: Engine, processor: Savable, recipe: Recipe, stage: StageSpec, folder: Path, record: dict[str, Any]
) -> None:
    """Write model (adapters merged), processor, ``recipe.yaml`` with its plug-ins, and ``run.json`` to ``folder``: whole or not at all.

    All processes must call it; the engine is closed. Raises `CheckpointError` everywhere when the disk is full.
    """
    model: Any = engine.model
    state = engine.state_dict() if engine.shares_weights else None
    engine.close()
    error = ""
    if distributed.is_main():
        temporary = folder.with_name(f".writing-{folder.name}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            exported = model if state is None else rebuild(model, state)
            if lora.has_adapters(exported):
                save_adapters(exported, temporary / "adapters.safetensors")
                lora.merge(exported)
            write_model(exported, processor, temporary)
            (temporary / "recipe.yaml").write_text(
                yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
            copy_files(recipe.plugins, temporary)
            (temporary / "run.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
            by_umask(temporary)
            sizes = {p.name: p.stat().st_size for p in sorted(temporary.iterdir()) if p.is_file()}
            (temporary / DONE).write_text(json.dumps({"stage": stage.name, "files": sizes}, indent=1), encoding="utf-8")
            for path in temporary.iterdir():
                if path.is_file():
                    sync_file(path)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            sync_directory(folder.parent)
        except Exception as problem:  # the other processes wait for the answer, whatever went wrong
            shutil.rmtree(temporary, ignore_errors=True)
            error = f"{type(problem).__name__}: {problem}"
    error = distributed.gather_objects(error)[0]
    if error:
        saved = found(folder.parent / "checkpoints" / stage.name)
        kept = (
            f"Its last checkpoint is intact ({saved[-1].name}); free space or cure the cause, then go on with --resume"
            if saved
            else "It has no checkpoint, so --resume trains it again from its start: free space or cure the cause first"
        )
        raise CheckpointError(f"{folder}: the trained stage could not be written ({error}). {kept}")


def write_model(model: Savable, processor: Savable, folder: Path) -> None:
    """``save_pretrained`` of model and processor."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def rebuild(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A CPU model of the same structure (adapters included) that holds ``state``: the partitioned one cannot be
    saved."""
    with torch.device("meta"):
        fresh = type(model)(model.config)
    if any(lora.is_adapter(name) for name in state):
        _inject_like(model, fresh)
    fresh.load_state_dict(state, strict=True, assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    _tell_of_decoder(model, fresh)
    return fresh


def _tell_of_decoder(model: Any, fresh: Any) -> None:
    """Where the diffusion decoder lies that goes with the visual tokenizer: no tensor, so no part of the state."""
    if getattr(model.config, "visual_tokenizer", None) is not None and hasattr(model, "image_tokenizer"):
        given, own = model.image_tokenizer, fresh.image_tokenizer
        own.folder, own.decoder_of = given.folder, given.decoder_of


def _inject_like(model: Any, fresh: Any) -> None:
    from peft import inject_adapter_in_model

    with torch.device("meta"):
        for name, config in model.peft_config.items():
            inject_adapter_in_model(config, fresh, adapter_name=name)
    lora.activate_all(fresh)


def save_adapters(model: nn.Module, path: Path) -> None:
    """The adapters' tensors alone, by their names in the unmerged model."""
    from safetensors.torch import save_file

    save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if lora.is_adapter(n)}, path)


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder is there and whole. Raises `CheckpointError` for one that was damaged later."""
    marker = folder / DONE
    if not marker.is_file():
        return False
    for name, size in read_json(marker)["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: is missing or has changed since stage {folder.name} was finished; delete {folder} to redo it"
            )
    return True


def finished_otherwise(folder: Path, recipe: Recipe, stage: StageSpec, *, leave_out: Collection[str] = ()) -> str:
    """What the recipe a finished stage was trained with says otherwise of it, its model or its seed; empty: nothing."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return ""
    saved = upgraded(read_yaml(path))
    used = {s.get("name"): withdrawn_from(s) for s in saved["stages"]}
    with contextlib.suppress(ConfigError):  # then it is compared as it is
        saved = to_plain(validate(Recipe, saved))  # settings that were not yet there have their defaults

    def settings(plain: dict[str, Any]) -> dict[str, Any]:
        own = next((s for s in plain.get("stages", []) if s.get("name") == stage.name), {})
        own = {key: value for key, value in own.items() if key not in COSMETIC}
        return {**own, "model": plain.get("model"), "seed": plain.get("seed")}

    then, now = {**settings(saved), **used.get(stage.name, {})}, settings(to_plain(recipe))
    return difference(json.dumps(then, sort_keys=True), json.dumps(now, sort_keys=True), leave_out=leave_out)


def publish(source: Path, target: Path) -> None:
    """Make ``target`` the same directory as ``source``, by hard links where the file system has them; at once."""
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in sorted(source.rglob("*")):  # a model may carry a decoder in a folder of its own
        place = temporary / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
            continue
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
