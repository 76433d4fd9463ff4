"""What of a checkpoint is not its published language model, how is that saved by itself, and how do the two become one again?"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.config import read_yaml, validate
from mllm.damage import LEFT_OUT, damage_in, hub_file, read_json, read_safetensors
from mllm.errors import CheckpointError, ConfigError
from mllm.former_recipes import upgraded
from mllm.models import lora
from mllm.modes import by_umask
from mllm.recipe import LanguageModelSpec, LoraSpec

WEIGHTS, ADAPTER = "trained_parts.safetensors", "adapters.safetensors"
"""Not ``model.safetensors``: whatever reads that would fill the gaps."""
_DECODER, _HEAD = "model.language_model.", "lm_head."
_ROWS = "rows_of."
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "stage.json", "README.md", LEFT_OUT, "__pycache__", ".*")


def parts_folder(name: str | Path) -> Path | None:
    """Where a checkpoint without its language model lies (one on the hub is fetched); None when ``name`` is no such thing."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder if (folder / LEFT_OUT).is_file() else None
    if hub_file(str(name), LEFT_OUT) is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name)))


def split(checkpoint: Path, target: Path) -> dict[str, Any]:
    """Write everything of a checkpoint but its language model to ``target``, once the published one and the adapter are shown to give it.

    Args:
        checkpoint: a whole checkpoint's folder, with ``recipe.yaml`` and, where it learned by LoRA, ``adapters.safetensors``.
        target: a folder to make.

    Returns:
        What ``language_model.json`` says; ``rounded``: weights that the merge gives otherwise here, within its dtype's rounding.

    Raises:
        CheckpointError: the language model is not the published one with the adapter. Nothing is written.
        ConfigError: it has no published source.
    """
    from mllm.models.weight_files import read_tensors, some_names

    if problem := damage_in(checkpoint):
        raise CheckpointError(problem)
    spec, how = _origin(checkpoint)
    tensors = read_tensors(checkpoint)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith((_DECODER, _HEAD))}
    whole = {name: tensor for name, tensor in tensors.items() if name not in own}
    dtype = next((t.dtype for t in whole.values() if t.is_floating_point()), torch.float32)
    config = read_json(checkpoint / "config.json")
    adapter: dict[str, Tensor] = {}
    if how is not None and (checkpoint / ADAPTER).is_file():
        saved = read_safetensors(checkpoint / ADAPTER)
        adapter = {name: tensor for name, tensor in saved.items() if name.startswith(_DECODER) and ".lora_" in name}
    settings = {} if how is None or not adapter else _on_layers_of(how, adapter)
    model, base, tables = _published(spec, dtype)
    made = _merged(model, spec, settings, adapter) if adapter else base
    if made.keys() - whole.keys() - {n for n in made if n.startswith(_HEAD)} or whole.keys() - made.keys():
        names = some_names(sorted(set(made) ^ set(whole)))
        raise CheckpointError(f"{checkpoint}: its language model has other tensors than {spec.source}: {names}")
    differing: list[str] = []
    firsts: dict[str, int] = {}
    rounded = 0
    for name, tensor in whole.items():
        known = made[name]
        if name in tables:
            firsts[name] = first = min([known.shape[0], *(config.get("added_token_ids") or ())[:1]])
            own[_ROWS + name] = tensor[first:].clone()
            tensor, known = tensor[:first], known[:first]
        if torch.equal(tensor, known):
            continue
        if tensor.shape != known.shape or not _within_rounding(tensor, known, base[name]):
            differing.append(name)
        else:
            rounded += int((tensor != known).sum())
    if differing:
        raise CheckpointError(
            f"{checkpoint}: its language model is not {spec.source} with the adapter that lies here: {len(differing)} of {len(whole)} "
            f"tensors are others ({some_names(differing)}), as after learning whole, in 4 bits, or by an earlier adapter. "
            "Leave --without-language-model out: the checkpoint goes with all its weights"
        )
    record = {
        "source": spec.source,
        "revision": spec.revision,
        "licence": spec.licence,
        "spec": spec.model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
        "num_tensors": len(base),
        "sha256": _hash(base),
        "tables": firsts,
        "names": sorted(whole),
        "adapter": settings,
        "rounded": rounded,
    }
    _write(checkpoint, target, own, adapter, record)
    return record


def _write(
    checkpoint: Path, target: Path, own: dict[str, Tensor], adapter: dict[str, Tensor], record: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    shutil.copytree(checkpoint, target, dirs_exist_ok=True, ignore=_left_out_of(checkpoint))
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, target / WEIGHTS, {"format": "pt"})
    if adapter:
        save_file(adapter, target / ADAPTER, {"format": "pt"})
    names = [WEIGHTS, *([ADAPTER] if adapter else [])]
    files = {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in names}
    (target / LEFT_OUT).write_text(json.dumps({**record, "files": files}, indent=1) + "\n", encoding="utf-8")
    by_umask(target)


def _left_out_of(checkpoint: Path) -> Any:
    """For ``copytree``: weights at the top, which are written anew; a decoder in a folder of its own is copied."""
    patterns = shutil.ignore_patterns(*_WEIGHT_FILES)
    return lambda folder, names: patterns(folder, names) if Path(folder) == checkpoint else set()


def join(folder: Path, target: Path, *, dtype: str = "auto", shard_size: str = "5GB") -> Path:
    """Fetch the language model that a folder of `split` names, and write the whole checkpoint to ``target``.

    Args:
        folder: what `split` wrote.
        target: a folder to make.
        dtype: of the weights written; auto: as they were.
        shard_size: largest safetensors file.

    Raises:
        CheckpointError: a damaged file, or another language model than the one named.
        UnavailableError: the language model cannot be read.
    """
    from huggingface_hub import save_torch_state_dict

    if problem := damage_in(folder):
        raise CheckpointError(problem)
    record = read_json(folder / LEFT_OUT)
    for name, expected in record["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; copy the folder again")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise CheckpointError(f"{folder / name}: has changed since it was written (another sha256); copy it again")
    spec = validate(LanguageModelSpec, {**record["spec"], "source": record["source"], "revision": record["revision"]})
    stored = getattr(torch, record["dtype"])
    model, base, _ = _published(spec, stored)
    if (found := _hash(base)) != record["sha256"]:
        raise CheckpointError(
            f"{folder}: {spec.source} is another language model than the one that was left out (sha256 of its tensors {found[:12]}…, "
            f"expected {record['sha256'][:12]}…); give the right source and revision in {LEFT_OUT}"
        )
    own = read_safetensors(folder / WEIGHTS)
    adapter = read_safetensors(folder / ADAPTER) if record["adapter"] else {}
    made = _merged(model, spec, record["adapter"], adapter) if adapter else base
    whole = {name: made[name] for name in record["names"]}
    for name, first in record["tables"].items():
        whole[name] = torch.cat([made[name][:first], own.pop(_ROWS + name)])
    whole |= own
    if dtype != "auto":
        whole = {n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in whole.items()}
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=_left_out_of(folder))
    if dtype != "auto":
        path = target / "config.json"
        path.write_text(json.dumps(read_json(path) | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict({n: t.contiguous() for n, t in whole.items()}, target, max_shard_size=shard_size)
    by_umask(target)
    return target


def _origin(checkpoint: Path) -> tuple[LanguageModelSpec, LoraSpec | None]:
    """The recipe's language model, and how it learned in the stage that wrote the checkpoint."""
    if not (checkpoint / "recipe.yaml").is_file():
        raise ConfigError(f"{checkpoint}: no recipe.yaml, which says where its language model is from")
    recipe = upgraded(read_yaml(checkpoint / "recipe.yaml"))
    spec = validate(LanguageModelSpec, recipe["model"]["language_model"], where="model.language_model")
    if spec.source is None:
        raise ConfigError(
            f"{checkpoint}: its language model began from scratch (no model.language_model.source), so nobody else has it; leave "
            "--without-language-model out"
        )
    stages = {stage["name"]: stage for stage in recipe.get("stages") or ()}
    marker = checkpoint / "stage.json"
    last = read_json(marker)["stage"] if marker.is_file() else next(reversed(stages), None)
    how = ((stages.get(last) or {}).get("learn") or {}).get("language_model")
    adapted = how.get("lora") if isinstance(how, Mapping) else None
    return spec, None if adapted is None else validate(
        LoraSpec, adapted, where=f"stages.{last}.learn.language_model.lora"
    )


def _on_layers_of(how: LoraSpec, adapter: Mapping[str, Tensor]) -> dict[str, Any]:
    """How it learned, with the layers by name that have an adapter."""
    layers = {name.removeprefix(_DECODER).partition(".lora_")[0] for name in adapter}
    return {**how.model_dump(mode="json"), "target": sorted(layers)}


def _tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a causal language model by their names in our checkpoints."""
    head = model.get_output_embeddings()
    named = {_DECODER + name: tensor for name, tensor in model.base_model.state_dict().items()}
    return named | {_HEAD + name: tensor for name, tensor in head.state_dict().items()}


def _published(spec: LanguageModelSpec, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], set[str]]:
    """A published language model, its tensors, and the names of those with a row for every token."""
    from mllm.models.build import text_config
    from mllm.models.text_source import open_language_model

    model = open_language_model(spec, text_config(spec), dtype)
    inputs = model.get_input_embeddings()
    table = next(name for name, module in model.base_model.named_modules() if module is inputs)
    found = _tensors(model)
    return model, found, {f"{_DECODER}{table}.weight", *(name for name in found if name.startswith(_HEAD))}


def _merged(
    model: Any, spec: LanguageModelSpec, how: Mapping[str, Any], adapter: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a published language model with an adapter merged into it. Merged layers get new tensors: those that `_published`
    gave stay as they were."""
    decoder = model.base_model
    lora.inject(decoder, "language_model", list(decoder.named_children()), validate(LoraSpec, how), skip=set())
    given = {name.removeprefix(_DECODER): tensor for name, tensor in adapter.items()}
    wanted = {name for name in decoder.state_dict() if lora.is_adapter(name)}
    if wanted != given.keys():
        raise CheckpointError(f"{ADAPTER}: does not fit {spec.source}: {sorted(wanted ^ given.keys())[:3]}")
    decoder.load_state_dict(given, strict=False, assign=True)
    lora.merge(decoder)
    return _tensors(model)


def _within_rounding(found: Tensor, made: Tensor, base: Tensor) -> bool:
    """Whether two merges of one adapter differ by their dtype's rounding alone. A tensor without an adapter must be the same."""
    if found.dtype != made.dtype or torch.equal(made, base):
        return False
    step = torch.finfo(made.dtype).eps
    delta = (made.float() - base.float()).abs()
    return bool(((found.float() - made.float()).abs() <= step * (made.float().abs() + 2 * delta + delta.max())).all())


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
