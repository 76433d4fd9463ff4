"""What of a checkpoint is not published already, how is that saved by itself, and how do the two become one again, to the bit?"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.config import read_yaml, validate
from mllm.damage import LEFT_OUT, damage_in, hub_file, read_json, read_safetensors
from mllm.errors import CheckpointError, ConfigError, MllmError, UnavailableError
from mllm.former_recipes import upgraded
from mllm.models.published import DECODER, ENCODERS, HEAD, Made, Step, after_stages, hash_of, make_encoder
from mllm.models.text_source import open_language_model
from mllm.models.weight_files import read_tensors, some_names
from mllm.modes import by_umask
from mllm.parts.get import PREFIX, is_part
from mllm.recipe import LanguageModelSpec, LoraSpec, StageSpec

_log = logging.getLogger(__name__)
WEIGHTS, ADAPTER = "trained_parts.safetensors", "adapters.safetensors"
"""Not ``model.safetensors``: whatever reads that would fill the gaps."""
_ROWS, _BITS = "rows_of.", "bits_of."
"""Before a tensor's name: its rows of added tokens; the bits in which it differs from what is made of published weights."""
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "stage.json", "README.md", LEFT_OUT, "__pycache__", ".*")
_INSTEAD = "leave --without-language-model out: the checkpoint goes with all its weights"


def parts_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """Where a checkpoint's trained parts lie (those on the hub are fetched); None when ``name`` is no such thing."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder if (folder / LEFT_OUT).is_file() else None
    if hub_file(str(name), LEFT_OUT, revision) is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), revision=revision))


def split(checkpoint: Path, target: Path) -> dict[str, Any]:
    """Write what of a checkpoint is not published to ``target``, once the published language model and the adapters are shown to give it.

    Encoders whose weights are those of their source to the bit are left out too, tensor by tensor; one whose source is not at hand is kept.

    Args:
        checkpoint: a whole checkpoint's folder, with ``recipe.yaml`` and the adapter of its stage; those of stages before it lie in
            the run, ``../STAGE/adapters.safetensors``.
        target: a folder to make.

    Returns:
        What ``left_out.json`` says.

    Raises:
        CheckpointError: the language model is not the published one with these adapters. Nothing is written.
        ConfigError: it has no published source, or learned whole.
    """
    if problem := damage_in(checkpoint):
        raise CheckpointError(problem)
    tensors = read_tensors(checkpoint)
    config = read_json(checkpoint / "config.json")
    whole = {name: tensor for name, tensor in tensors.items() if name.startswith((DECODER, HEAD))}
    stored = next((t.dtype for t in whole.values() if t.is_floating_point()), torch.float32)
    spec, steps = _history(checkpoint, str(stored).removeprefix("torch."))
    made = after_stages(open_language_model(spec, getattr(torch, steps[0].dtype)), spec, steps)
    own = {name: tensor for name, tensor in tensors.items() if name not in made.tensors}
    language = _language_record(checkpoint, config, whole, spec, steps, made, own)
    encoders = {}
    for name, settings in config["encoders"].items():
        if (settings.get("weights") or {}).get("source"):
            encoders |= _encoder_record(name, settings, [step.dtype for step in steps], own)
    record = {"language_model": language, "encoders": encoders, "made_with": _versions([step.lora for step in steps])}
    _write(checkpoint, target, own, steps, record)
    return record


def _history(checkpoint: Path, stored: str) -> tuple[LanguageModelSpec, list[Step]]:
    """The recipe's language model, and what the stages up to the checkpoint's did with it."""
    if not (checkpoint / "recipe.yaml").is_file():
        raise ConfigError(f"{checkpoint}: no recipe.yaml, which says where its language model is from")
    recipe = upgraded(read_yaml(checkpoint / "recipe.yaml"))
    spec = validate(LanguageModelSpec, recipe["model"]["language_model"], where="model.language_model")
    if spec.source is None:
        raise ConfigError(
            f"{checkpoint}: its language model began from scratch (no model.language_model.source), so nobody else has it; {_INSTEAD}"
        )
    stages = list(recipe.get("stages") or ())
    marker = checkpoint / "stage.json"
    last = read_json(marker)["stage"] if marker.is_file() else stages[-1]["name"]
    before = list(takewhile(lambda stage: stage["name"] != last, stages))
    steps = []
    for stage in [*before, *(stage for stage in stages if stage["name"] == last)]:
        name, how = stage["name"], (stage.get("learn") or {}).get("language_model")
        dtype = stage.get("dtype", StageSpec.model_fields["dtype"].default)
        if how is None:
            steps.append(Step(name, dtype))
            continue
        if not isinstance(how, Mapping) or how.get("lora") is None:
            raise ConfigError(
                f"{checkpoint}: its language model learned whole, in stage {name}, not by an adapter; {_INSTEAD}"
            )
        file = (checkpoint if name == last else checkpoint.parent / name) / ADAPTER
        if not file.is_file():
            raise ConfigError(
                f"{checkpoint}: its language model learned by an adapter in stage {name}, which is not there ({file}); copy it, or "
                f"{_INSTEAD}"
            )
        adapter = {n: t for n, t in read_safetensors(file).items() if n.startswith(DECODER) and ".lora_" in n}
        layers = sorted({n.removeprefix(DECODER).partition(".lora_")[0] for n in adapter})
        spec_of = validate(LoraSpec, how["lora"], where=f"stages.{name}.learn.language_model.lora")
        steps.append(Step(name, dtype, {**spec_of.model_dump(mode="json"), "target": layers}, adapter))
    return spec, [*steps, Step("", stored)]


def _language_record(
    checkpoint: Path,
    config: Mapping[str, Any],
    whole: Mapping[str, Tensor],
    spec: LanguageModelSpec,
    steps: list[Step],
    made: Made,
    own: dict[str, Tensor],
) -> dict[str, Any]:
    """What the record says of the language model; what is needed beside it goes into ``own``."""
    if absent := sorted(n for n in made.tensors if n not in whole and not n.startswith(HEAD)):
        raise CheckpointError(f"{checkpoint}: its language model lacks tensors of {spec.source}: {some_names(absent)}")
    firsts: dict[str, int] = {}
    given: dict[str, Tensor] = {}
    differing: list[str] = []
    for name in sorted(made.tensors.keys() & whole.keys()):
        tensor, known, published = whole[name], made.tensors[name], made.published[name]
        if name in made.tables:
            firsts[name] = first = min([known.shape[0], *(config.get("added_token_ids") or ())[:1]])
            own[_ROWS + name] = tensor[first:].clone()
            tensor, known, published = tensor[:first], known[:first], published[:first]
        given[name] = tensor
        if torch.equal(tensor, known):
            continue
        if _within_rounding(name, tensor, known, published, steps):
            own[_BITS + name] = _differing_bits(tensor, known)
        else:
            differing.append(name)
    if differing:
        stages = [step.stage for step in steps if step.lora is not None]
        known = f"{spec.source} with the adapters of {', '.join(stages)}" if stages else str(spec.source)
        raise CheckpointError(
            f"{checkpoint}: its language model is not {known}: {len(differing)} of {len(given)} tensors are others "
            f"({some_names(differing)}), by more than rounding; {_INSTEAD}"
        )
    return {
        "source": spec.source,
        "revision": spec.revision,
        "licence": spec.licence,
        "spec": spec.model_dump(mode="json"),
        "sha256": hash_of(made.published),
        "steps": [
            {"stage": step.stage, "dtype": step.dtype, "lora": step.lora, "file": _file_of(step)} for step in steps
        ],
        "tables": firsts,
        "tensors": {name: _hash(tensor) for name, tensor in given.items()},
    }


def _encoder_record(
    name: str, settings: Mapping[str, Any], dtypes: list[str], own: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What the record says of an encoder, nothing where all of it learned; what its source gives is taken out of ``own``."""
    prefix = f"{ENCODERS}{name}."
    names = [n.removeprefix(prefix) for n in own if n.startswith(prefix)]
    try:
        made = make_encoder(settings, f"encoders.{name}", dtypes, names)
    except MllmError as error:
        _log.warning("encoder %s goes with its weights: its source cannot be compared with (%s)", name, error)
        return {}
    same = {n: tensor for n, tensor in made.items() if _equal(tensor, own[prefix + n])}
    if not same:
        return {}
    for n in same:
        del own[prefix + n]
    weights = settings["weights"]
    return {
        name: {
            "source": weights["source"],
            "revision": weights.get("revision"),
            "dtypes": dtypes,
            "tensors": {n: _hash(tensor) for n, tensor in sorted(same.items())},
        }
    }


def _write(checkpoint: Path, target: Path, own: dict[str, Tensor], steps: list[Step], record: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    shutil.copytree(checkpoint, target, dirs_exist_ok=True, ignore=_left_out_of(checkpoint))
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, target / WEIGHTS, {"format": "pt"})
    adapted = {_file_of(step): step.adapter for step in steps if step.lora is not None}
    for name, adapter in adapted.items():
        save_file(dict(adapter), target / str(name), {"format": "pt"})
    files = {name: hashlib.sha256((target / str(name)).read_bytes()).hexdigest() for name in (WEIGHTS, *adapted)}
    (target / LEFT_OUT).write_text(json.dumps({**record, "files": files}, indent=1) + "\n", encoding="utf-8")
    by_umask(target)


def _file_of(step: Step) -> str | None:
    return None if step.lora is None else f"adapters.{step.stage}.safetensors"


def _left_out_of(checkpoint: Path) -> Any:
    """For ``copytree``: weights at the top, which are written anew; a decoder in a folder of its own is copied."""
    patterns = shutil.ignore_patterns(*_WEIGHT_FILES)
    return lambda folder, names: patterns(folder, names) if Path(folder) == checkpoint else set()


def whole_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint that `split` was given, to the bit, by its name there; published weights are fetched.

    Args:
        folder: what `split` wrote.

    Returns:
        Name → tensor, on the CPU.

    Raises:
        CheckpointError: a damaged file, other published weights than those named, or a tensor that came out otherwise.
        UnavailableError: published weights are not at hand; it says how to get them.
    """
    if problem := damage_in(folder):
        raise CheckpointError(problem)
    record = read_json(folder / LEFT_OUT)
    for name, expected in record["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; copy the folder again")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise CheckpointError(f"{folder / name}: has changed since it was written (another sha256); copy it again")
    language = record["language_model"]
    whole = read_safetensors(folder / WEIGHTS)
    tensors = _language_tensors(folder, language, whole)
    others = [name for name, tensor in tensors.items() if _hash(tensor) != language["tensors"][name]]
    if others:
        raise CheckpointError(
            f"{folder}: {len(others)} of {len(tensors)} tensors of the language model came out otherwise than they were "
            f"({some_names(others)}): this machine or its packages compute otherwise. Written with {record['made_with']}, here "
            f"{_versions([step['lora'] for step in language['steps']])}; use those versions, or make the whole checkpoint where it was "
            f"written: mllm export {folder} WHOLE"
        )
    for name in language["tables"]:
        tensors[name] = torch.cat([tensors[name], whole.pop(_ROWS + name)])
    whole |= tensors
    settings = read_json(folder / "config.json")["encoders"]
    for name, entry in record["encoders"].items():
        what = f"encoder {name}"
        with_source = {**settings[name], "weights": {**settings[name]["weights"], **_place(entry)}}
        with _at_hand(folder, what, entry):
            made = make_encoder(with_source, f"encoders.{name}", entry["dtypes"], list(entry["tensors"]))
        if {n: _hash(tensor) for n, tensor in made.items()} != entry["tensors"]:
            raise CheckpointError(_another(folder, what, entry))
        whole |= {f"{ENCODERS}{name}.{n}": tensor for n, tensor in made.items()}
    return whole


def join(folder: Path, target: Path, *, dtype: str = "auto", shard_size: str = "5GB") -> Path:
    """Write the whole checkpoint of a folder of trained parts to ``target``.

    Args:
        folder: what `split` wrote.
        target: a folder to make.
        dtype: of the weights written; auto: as they were.
        shard_size: largest safetensors file.

    Returns:
        ``target``.

    Raises:
        CheckpointError: as `whole_tensors`.
        UnavailableError: as `whole_tensors`.
    """
    from huggingface_hub import save_torch_state_dict

    whole = whole_tensors(folder)
    if dtype != "auto":
        whole = {n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in whole.items()}
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=_left_out_of(folder))
    if dtype != "auto":
        path = target / "config.json"
        path.write_text(json.dumps(read_json(path) | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict({n: t.contiguous() for n, t in whole.items()}, target, max_shard_size=shard_size)
    by_umask(target)
    return target


def _language_tensors(folder: Path, record: Mapping[str, Any], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The language model's tensors without rows of added tokens. What ``own`` says of differing bits is taken out of it."""
    spec = validate(LanguageModelSpec, {**record["spec"], **_place(record)})
    steps = [
        Step(
            step["stage"], step["dtype"], step["lora"], read_safetensors(folder / step["file"]) if step["lora"] else {}
        )
        for step in record["steps"]
    ]
    with _at_hand(folder, "language model", record):
        model = open_language_model(spec, getattr(torch, steps[0].dtype))
    made = after_stages(model, spec, steps)
    if hash_of(made.published) != record["sha256"]:
        raise CheckpointError(_another(folder, "language model", record))
    found = {}
    for name in record["tensors"]:
        tensor = made.tensors[name][: record["tables"].get(name)]
        bits = own.pop(_BITS + name, None)
        found[name] = tensor if bits is None else _with_bits(tensor, bits)
    return found


def _place(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"source": entry["source"], "revision": entry["revision"]}


@contextmanager
def _at_hand(folder: Path, what: str, entry: Mapping[str, Any]) -> Iterator[None]:
    """Say how published weights are got where they cannot be read."""
    try:
        yield
    except (UnavailableError, CheckpointError) as error:
        source, path = entry["source"], Path(entry["source"]).expanduser()
        is_path = source.startswith((".", "/", "~")) or path.suffix != "" or path.exists()
        if isinstance(error, CheckpointError) and not (is_path and not path.exists()):
            raise
        if is_part(source):
            how = f"mllm parts get {source.removeprefix(PREFIX)}"
        elif is_path:
            how = f"copy it to {path.absolute()}"
        else:
            how = f"hf download {source}" + (f" --revision {entry['revision']}" if entry["revision"] else "")
        raise UnavailableError(
            f"{folder}: these are trained parts, and the {what} that goes with them, {source}, is not at hand ({error}). Fetch it: {how}; "
            f"or give another place as its source in {folder / LEFT_OUT}"
        ) from error


def _another(folder: Path, what: str, entry: Mapping[str, Any]) -> str:
    return (
        f"{folder}: {entry['source']} is another {what} than the one that was left out (sha256 of its tensors); give the right source "
        f"and revision in {folder / LEFT_OUT}"
    )


def _within_rounding(name: str, found: Tensor, made: Tensor, published: Tensor, steps: list[Step]) -> bool:
    """Whether a tensor differs from what the adapters make of it by rounding alone. One without an adapter must be the same."""
    adapted = [
        k for k, step in enumerate(steps) if step.lora and name in {f"{DECODER}{n}.weight" for n in step.lora["target"]}
    ]
    eps = [torch.finfo(getattr(torch, step.dtype)).eps for step in steps[adapted[0] :]] if adapted else []
    if not eps or found.dtype != made.dtype or found.shape != made.shape:
        return False
    delta = (made.float() - published.float()).abs()
    allowed = sum(eps) * (made.float().abs() + 2 * delta + delta.max())
    return bool(((found.float() - made.float()).abs() <= allowed).all())


def _planes(tensor: Tensor) -> Any:
    """A tensor's bytes ``(bytes of an element, elements)``: those that say the same lie together."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.reshape(-1, tensor.element_size()).T


def _differing_bits(found: Tensor, made: Tensor) -> Tensor:
    """Which bits of ``made`` to flip, packed: few, in the last places, so it is small."""
    flips = np.ascontiguousarray(_planes(found) ^ _planes(made))
    return torch.frombuffer(bytearray(zlib.compress(flips.tobytes(), 6)), dtype=torch.uint8)


def _with_bits(made: Tensor, packed: Tensor) -> Tensor:
    planes = _planes(made)
    flips = zlib.decompressobj().decompress(packed.numpy().tobytes(), planes.size)
    if len(flips) != planes.size:
        raise CheckpointError(
            f"{WEIGHTS}: differing bits of {len(flips)} bytes for a tensor of {planes.size}; copy it again"
        )
    data = planes ^ np.frombuffer(flips, np.uint8).reshape(planes.shape)
    return torch.from_numpy(np.ascontiguousarray(data.T)).reshape(-1).view(made.dtype).reshape(made.shape)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _hash(tensor: Tensor) -> str:
    return hash_of({"": tensor})


def _versions(adapters: list[Any]) -> dict[str, str]:
    """Of the packages whose arithmetic decides the last bits."""
    names = ["torch", *(["peft"] if any(adapters) else [])]
    names += ["bitsandbytes"] if any(how and how["bits"] for how in adapters) else []
    return {name: importlib.metadata.version(name) for name in names}
