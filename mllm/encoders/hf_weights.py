"""How do published weights get into a vision model of transformers?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from mllm.damage import naming_damage, read_json
from mllm.encoders.hf_models import NOISE, model_class, new_model, prepare, unwrap
from mllm.encoders.weights import local_path, read_weights, shorten, strip_prefix, unavailable
from mllm.errors import CheckpointError
from mllm.noise import load_report_unless_told
from mllm.types import ImageSpec, WeightsSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_UNUSED = ("mask_token", "position_ids", "inv_freq", "num_batches_tracked", "relative_position_index")
"""Tensors beside others that say nothing of a picture."""
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_published_config(weights: WeightsSource) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture, preprocessing overrides) that a hub id or folder publishes. Raises `UnavailableError`."""
    path = local_path(weights.source)
    try:
        with naming_damage(path or weights.source):
            full = AutoConfig.from_pretrained(str(path or weights.source), revision=weights.revision)
    except (OSError, ValueError) as error:
        if path is not None:
            raise CheckpointError(f"weights: {path} has no readable config.json ({error})") from error
        raise unavailable(weights.source, error) from error
    inner = getattr(full, "vision_config", None) or full
    architecture = {k: v for k, v in inner.to_diff_dict().items() if k not in NOISE}
    return {"model_type": inner.model_type, **architecture}, _read_preprocessing(weights, path)


def _read_preprocessing(weights: WeightsSource, path: Path | None) -> dict[str, Any]:
    name = "preprocessor_config.json"
    if path is not None:
        file = path / name if path.is_dir() else None
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            file = Path(hf_hub_download(weights.source, name, revision=weights.revision))
        except EntryNotFoundError:
            file = None
        except Exception as error:
            raise unavailable(weights.source, error) from error
    if file is None or not file.is_file():
        return {}
    published = read_json(file)
    found: dict[str, Any] = {}
    if published.get("do_normalize", True) and "image_mean" in published:
        found["mean"], found["std"] = tuple(published["image_mean"]), tuple(published["image_std"])
    if published.get("resample") in _INTERPOLATION:
        found["interpolation"] = _INTERPOLATION[published["resample"]]
    return found


@load_report_unless_told()
def load_donor(model: nn.Module, native: PreTrainedConfig, weights: WeightsSource) -> nn.Module:
    """The published model at its own image size, with weights for at least everything that ``model`` has.

    Raises `CheckpointError` listing keys that are missing or belong to another architecture, `UnavailableError`
    without network.
    """
    needed = set(model.state_dict())
    path = local_path(weights.source)
    if path is not None and path.is_file():
        return _donor_from_tensors(read_weights(path), native, needed, str(path))
    prepare(native)
    try:
        with naming_damage(path or weights.source):
            donor, report = model_class(native).from_pretrained(
                str(path or weights.source),
                revision=weights.revision,
                config=native,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except CheckpointError as error:
        raise CheckpointError(f"weights: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"weights: {weights.source} does not fit this encoder: {error}") from error
    except Exception as error:
        if path is not None:
            raise CheckpointError(f"weights: {path} cannot be read: {error}") from error
        raise unavailable(weights.source, error) from error
    donor = unwrap(donor)
    if not any(_is_needed(key, needed) for key in report["missing_keys"]):
        _refuse_more(report["unexpected_keys"], needed, weights.source)
        return donor
    # The vision part lies under a prefix that transformers does not know, e.g. Pix2Struct's ``encoder.``.
    if path is None:
        from huggingface_hub import snapshot_download

        try:
            path = Path(
                snapshot_download(weights.source, revision=weights.revision, allow_patterns=["*.safetensors", "*.json"])
            )
        except Exception as error:
            raise unavailable(weights.source, error) from error
    return _donor_from_tensors(read_weights(path), native, needed, weights.source)


def _is_needed(key: str, needed: set[str]) -> bool:
    """Whether a key, or what follows a wrapper's prefix, is one of ``needed``."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in needed for i in range(len(parts)))


def _refuse_more(unexpected: Any, needed: set[str], source: str) -> None:
    """A checkpoint with more blocks than the architecture, or with more in a module that it has (register tokens), is another model."""
    stems = {key.split(".0.")[0] + "." for key in needed if ".0." in key}
    deeper = [key for key in unexpected if key.startswith(tuple(stems))]
    if deeper:
        raise CheckpointError(
            f"weights: {source} has {len(deeper)} keys of blocks that this architecture lacks: {shorten(deeper)}"
        )
    modules = {key.rpartition(".")[0] for key in needed} - {""}
    more = [key for key in unexpected if key.rpartition(".")[0] in modules and not key.endswith(_UNUSED)]
    if more:
        raise CheckpointError(
            f"weights: {source} has {len(more)} keys that this architecture lacks beside those that it has: {shorten(more)}. It is of "
            "another variant; give its own architecture"
        )


def _donor_from_tensors(state: dict[str, Tensor], native: PreTrainedConfig, needed: set[str], source: str) -> nn.Module:
    with torch.device("meta"):
        donor = new_model(native)
    own = donor.state_dict()
    state = strip_prefix(state, needed)
    if not needed <= set(state):
        state = _renamed(state, native)
    missing = sorted(needed - set(state))
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    _refuse_more([key for key in state if key not in own], needed, source)
    if missing or shapes:
        raise CheckpointError(
            f"weights: {source} does not fit this encoder. "
            f"{len(missing)} keys missing: {shorten(missing)}; {len(shapes)} of another shape: {shorten(shapes)}. "
            "architecture.image_size must be the size that the weights were trained with"
        )
    donor.load_state_dict({key: state[key] for key in own if key in state}, strict=False, assign=True)
    return donor


def _renamed(state: dict[str, Tensor], native: PreTrainedConfig) -> dict[str, Tensor]:
    """Weights under the names that this version of transformers has for those of older checkpoints: it renames on reading, which a part
    of a larger model's checkpoint (a depth model's backbone) is not given by itself. As they were where it cannot read them either."""
    try:
        donor, report = model_class(native).from_pretrained(
            None, config=native, state_dict=dict(state), dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError:  # other shapes, which are told by name
        return state
    absent = set(report["missing_keys"])
    found = {key: value for key, value in donor.state_dict().items() if key not in absent}
    found = strip_prefix(found, set(unwrap(donor).state_dict()))
    return {
        **found,
        **{key: state.get(key, torch.empty(0)) for key in report["unexpected_keys"]},
    }  # which may be renamed too


def fit_positions(donor: nn.Module, model: nn.Module, image: ImageSpec) -> dict[str, Tensor]:
    """The donor's weights, its position table brought to the image size by the family's own interpolation."""
    state, own = donor.state_dict(), model.state_dict()
    for path, module in donor.named_modules():
        interpolate = getattr(module, "interpolate_pos_encoding", None)
        for key in [k for k in own if path and k.startswith(f"{path}.") and "position_embedding" in k]:
            if interpolate is None or state[key].shape == own[key].shape:
                continue
            length, width = own[key].shape[-2:]
            with torch.no_grad():
                table = interpolate(torch.zeros(1, length, width), image.height, image.width)
            state[key] = table.reshape(own[key].shape).to(state[key].dtype)
    return state
