"""Which weights does a checkpoint folder hold, and which are missing?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mllm.damage import damage_in, damage_of, read_json, read_safetensors
from mllm.errors import CheckpointError

_SHOWN = 5


def refuse_gaps(where: str, info: Any, *, quantized: Any = None) -> None:
    """Raise `CheckpointError` when a checkpoint lacks weights of the model, or holds some of another shape or name."""
    details = info if isinstance(info, dict) else vars(info)
    missing, foreign = sorted(details.get("missing_keys") or []), sorted(details.get("unexpected_keys") or [])
    mismatched = sorted(
        str(item[0] if isinstance(item, tuple) else item) for item in details.get("mismatched_keys") or []
    )
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} weights are missing ({some_names(missing)}); a shard may be absent: copy the folder again"
        )
    if mismatched:
        problems.append(f"{len(mismatched)} weights have another shape ({some_names(mismatched)})")
    if foreign and quantized is None:
        problems.append(f"{len(foreign)} weights belong to no part of the model ({some_names(foreign)})")
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems))


def some_names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def chosen_dtype(dtype: Any, weights: Mapping[str, Tensor]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return next(iter(weights.values())).dtype if dtype in (None, "auto") else getattr(torch, dtype)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an HF folder: safetensors, else ``.bin`` read with ``weights_only``."""
    index = next(
        (
            folder / n
            for n in ("model.safetensors.index.json", "pytorch_model.bin.index.json")
            if (folder / n).is_file()
        ),
        None,
    )
    if index is not None:
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    else:
        files = [folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()][:1]
    if not files:
        raise CheckpointError(f"{folder}: no weights (model.safetensors or pytorch_model.bin)")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder}: shard {file.name} is missing; copy the folder again")
        tensors.update(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file))
    return tensors


def read_pickle(file: Path) -> Any:
    """A torch pickle that holds tensors only; anything else is refused."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if problem := damage_of(file):
            raise CheckpointError(problem) from error
        raise CheckpointError(
            f"{file}: refused, it is not a plain tensor file ({str(error).splitlines()[0][:160]}). Convert it to safetensors where you "
            "trust its origin"
        ) from error


def read_part(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of our checkpoint whose names begin with ``prefix``, without it; other shards are not opened.

    Raises `CheckpointError` for a missing or damaged shard, and when nothing has that name.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            places: dict[str, str] = read_json(index)["weight_map"]
            files = sorted({file for name, file in places.items() if name.startswith(prefix)})
        else:
            files = ["model.safetensors"]
        found = {}
        for file in files:
            with safe_open(folder / file, "pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
                found |= {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(damage_in(folder) or f"{folder}: {error}; copy the checkpoint again") from error
    if not found:
        raise CheckpointError(f"{folder}: no weights named {prefix}…")
    return found


def published_renamings(module: nn.Module) -> dict[str, list[WeightRenaming]]:
    """Path of every transformers model inside ``module`` → its renamings from published to present weight names.

    transformers 5 saves its models under their published names (DINOv2's ``attention.attention.query``) and renames on
    loading; encoders that are transformers models need the same here.
    """
    found: dict[str, list[WeightRenaming]] = {}
    for path, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(path.startswith(f"{seen}.") for seen in found):
            transforms = get_model_conversion_mapping(child, add_legacy=False)
            found[path] = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return found


def present_name(name: str, renamings: Mapping[str, Sequence[WeightRenaming]]) -> str:
    """A checkpoint's weight name as the module has it."""
    for path, transforms in renamings.items():
        if name.startswith(f"{path}."):
            inner = name[len(path) + 1 :]
            for transform in transforms:
                inner = transform.rename_source_key(inner)[0]
            return f"{path}.{inner}"
    return name
