"""How do weights of other formats become ours, and how do ours become one self-contained checkpoint?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAssignmentType=false, reportPrivateImportUsage=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleVariableOverride=false, reportOptionalIterable=false

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import CheckpointError, ConfigError, UnavailableError

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
            f"{len(missing)} weights are missing ({_some(missing)}); a shard may be absent: copy the folder again"
        )
    if mismatched:
        problems.append(f"{len(mismatched)} weights have another shape ({_some(mismatched)})")
    if foreign and quantized is None:
        problems.append(f"{len(foreign)} weights belong to no part of the model ({_some(foreign)})")
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


# Foreign formats ---------------------------------------------------------------------------------------------------------


def recognise(path: Any) -> str | None:
    """``llava`` (transformers' layout), ``llava_original``, ``prismatic``, or None: from the folder's config.json alone."""
    folder = Path(str(path))
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); the checkpoint is damaged, copy it again") from error
    if config.get("model_type") == "llava" and "vision_config" in config:
        return "llava"
    if "mm_vision_tower" in config:
        return "llava_original"
    if isinstance(config.get("model"), dict) and "vision_backbone_id" in config["model"]:
        return "prismatic"
    return None


def open_foreign(path: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    """Our model made from a recognised foreign checkpoint folder; None for everything else."""
    kind = recognise(path) if isinstance(path, (str, Path)) else None
    if kind is None:
        return None
    model, _ = read_foreign(Path(path), kind, dtype=dtype or "auto")
    device_map = kwargs.get("device_map")
    return model.eval() if device_map is None else model.eval().to(device_map)


def convert(source: str, target: str | Path, *, dtype: str = "auto", language_model: str | None = None) -> Path:
    """Write a foreign checkpoint as ours. Raises `CheckpointError` for a format that is not recognised."""
    target = Path(target)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} already holds a checkpoint; choose another folder")
    folder = Path(source)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source))
        except Exception as error:
            raise UnavailableError(
                f"{source}: no such folder, and the hub does not give it ({type(error).__name__})"
            ) from error
    kind = recognise(folder)
    if kind is None:
        raise CheckpointError(
            f"{source}: not a LLaVA-1.5 checkpoint (config.json with vision_config or mm_vision_tower) nor a Prismatic run "
            "(config.json with model.vision_backbone_id)"
        )
    model, processor = read_foreign(folder, kind, dtype=dtype, language_model=language_model)
    model.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)
    return target


def read_foreign(folder: Path, kind: str, *, dtype: Any = "auto", language_model: str | None = None) -> tuple[Any, Any]:
    """Model and processor (None where the folder has no tokenizer) of a foreign checkpoint."""
    if kind == "llava":
        return _read_llava(folder, dtype)
    if kind == "llava_original":
        return _read_llava_original(folder, dtype)
    return _read_prismatic(folder, dtype, language_model)


def _read_llava(folder: Path, dtype: Any) -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    try:
        source = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot read this LLaVA checkpoint: {error}") from error
    config: LlavaConfig = source.config
    if config.vision_feature_select_strategy not in ("default", "full"):
        raise ConfigError(
            f"{folder}: vision_feature_select_strategy {config.vision_feature_select_strategy!r} is not supported"
        )
    if config.vision_feature_select_strategy == "full":
        raise ConfigError(
            f"{folder}: this checkpoint keeps the class token among the visual tokens, which no connector of ours does"
        )
    layers = config.vision_feature_layer
    encoder = {
        "type": "hf",
        "architecture": config.vision_config.to_dict(),
        "layers": [layers] if isinstance(layers, int) else list(layers),
        **_preprocessing(folder),
    }
    spec = {
        "encoders": {"vision": encoder},
        "connector": {
            "type": "mlp",
            "depth": 2,
            "activation": _activation(config.projector_hidden_act, folder),
            "bias": getattr(config, "multimodal_projector_bias", True),
        },
    }
    model = _assemble(
        spec,
        text=config.text_config,
        image_token_id=config.image_token_id,
        dtype=source.dtype,
        decoder=source.model.language_model.state_dict(),
        head=source.lm_head.state_dict(),
        encoders={"vision": source.model.vision_tower.state_dict()},
        projector={
            f"projector.{ours}.{kind}": tensor
            for ours, theirs in (
                (0, source.model.multi_modal_projector.linear_1),
                (2, source.model.multi_modal_projector.linear_2),
            )
            for kind, tensor in theirs.state_dict().items()
        },
        where=folder,
    )
    model.generation_config = source.generation_config
    return model, _processor(folder, model, "vicuna")


def _read_llava_original(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """liuhaotian's layout: an LLM checkpoint with ``model.mm_projector.*``, the encoder by hub id."""
    from transformers import AutoConfig, LlamaConfig

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise ConfigError(f"{folder}: mm_projector_type {config.get('mm_projector_type')!r}; LLaVA-1.5 has mlp2x_gelu")
    weights = _read_tensors(folder)
    vision = config["mm_vision_tower"]
    try:
        architecture = AutoConfig.from_pretrained(vision)
    except OSError as error:
        raise UnavailableError(
            f"{folder}: its encoder {vision!r} cannot be read; put a local path into mm_vision_tower"
        ) from error
    architecture = getattr(architecture, "vision_config", architecture)
    text = LlamaConfig(
        **{k: v for k, v in config.items() if not k.startswith("mm_") and k not in ("model_type", "architectures")}
    )
    encoder_weights = {
        k.removeprefix("model.vision_tower.vision_tower."): v for k, v in weights.items() if ".vision_tower." in k
    }
    spec = {
        "encoders": {
            "vision": {
                "type": "hf",
                "architecture": architecture.to_dict(),
                "layers": [config.get("mm_vision_select_layer", -2)],
                "weights": {"source": vision},
            }
        },
        "connector": {"type": "mlp", "depth": 2},
    }
    projector = {
        k.replace("model.mm_projector.", "projector."): v
        for k, v in weights.items()
        if k.startswith("model.mm_projector.")
    }
    model = _assemble(
        spec,
        text=text,
        image_token_id=text.vocab_size,
        dtype=_dtype(dtype, weights),
        decoder={
            k.removeprefix("model."): v
            for k, v in weights.items()
            if re.match(r"model\.(layers|embed_tokens|norm)\.", k)
        },
        head={"weight": weights["lm_head.weight"]},
        encoders={"vision": {k.removeprefix("vision_model."): v for k, v in encoder_weights.items()}}
        if encoder_weights
        else {},
        projector=projector,
        where=folder,
    )
    if not encoder_weights:
        model.model.vision_tower.encoders["vision"].load_pretrained()
    return model, _processor(folder, model, "vicuna")


_PRISMATIC_ENCODERS: dict[str, dict[str, str]] = {
    "dinosiglip-vit-so-384px": {
        "dino_featurizer": "vit_large_patch14_reg4_dinov2",
        "siglip_featurizer": "vit_so400m_patch14_siglip_384",
    },
    "dinosiglip-vit-so-224px": {
        "dino_featurizer": "vit_large_patch14_reg4_dinov2",
        "siglip_featurizer": "vit_so400m_patch14_siglip_224",
    },
    "siglip-vit-so400m-384px": {"featurizer": "vit_so400m_patch14_siglip_384"},
    "siglip-vit-so400m": {"featurizer": "vit_so400m_patch14_siglip_224"},
    "clip-vit-l-336px": {"featurizer": "vit_large_patch14_clip_336"},
    "clip-vit-l": {"featurizer": "vit_large_patch14_clip_224"},
    "dinov2-vit-l": {"featurizer": "vit_large_patch14_reg4_dinov2"},
}
_PRISMATIC_RESIZE = {"resize-naive": "squash", "resize-crop": "crop", "letterbox": "letterbox"}


def _read_prismatic(folder: Path, dtype: Any, language_model: str | None) -> tuple[Any, Any]:
    """A Prismatic run: ``config.json`` and ``checkpoints/latest-checkpoint.pt`` (or ``.safetensors``) with ``projector``,
    ``llm_backbone`` and, when it was trained, ``vision_backbone``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    backbone, architecture = config["vision_backbone_id"], config.get("arch_specifier", "")
    featurizers = config.get("timm_models") or _PRISMATIC_ENCODERS.get(backbone)
    if featurizers is None:
        raise ConfigError(
            f"{folder}: vision_backbone_id {backbone!r} is not known; known: {', '.join(_PRISMATIC_ENCODERS)}"
        )
    weights = _read_checkpoint(folder / "checkpoints")
    parts = {name: weights[name] for name in ("projector", "llm_backbone") if name in weights}
    if len(parts) < 2:
        raise CheckpointError(f"{folder}: the checkpoint holds {sorted(weights)}, expected projector and llm_backbone")
    size = int(re.search(r"(\d+)px", backbone).group(1)) if re.search(r"\d+px", backbone) else 224  # type: ignore[union-attr]
    names = ["spatial", "semantic"] if len(featurizers) == 2 else ["vision"]
    resize = _PRISMATIC_RESIZE.get(config.get("image_resize_strategy", "letterbox"))
    if resize is None:
        raise ConfigError(f"{folder}: image_resize_strategy {config['image_resize_strategy']!r} is not supported")
    encoders = {
        name: {
            "type": "timm",
            "architecture": model,
            "options": config.get("timm_options", {}),
            "image_size": config.get("image_size", size),
            "layers": [-2],
            "final_norm": False,
            "resize": resize,
            "weights": {"source": "timm", "licence": "Apache-2.0"},
        }
        for name, model in zip(names, featurizers.values())
    }
    projector = dict(parts["projector"])
    linear = sorted({int(k.split(".")[1]) for k in projector if k.endswith("weight")})
    if "fused" in architecture and len(linear) != 3:
        raise CheckpointError(f"{folder}: {architecture} should have 3 linear layers, the checkpoint has {len(linear)}")
    hidden = [projector[f"projector.{i}.weight"].shape[0] for i in linear[:-1]]
    shape = {"depth": len(linear), **({"hidden": hidden} if hidden else {})}
    connector = {"type": "channel_concat", "projector": shape} if len(encoders) > 1 else {"type": "mlp", **shape}
    decoder = {k.removeprefix("llm."): v for k, v in parts["llm_backbone"].items()}
    text = _prismatic_text_config(decoder, language_model)
    vision = weights.get("vision_backbone", {})
    model = _assemble(
        {"encoders": encoders, "connector": connector},
        text=text,
        image_token_id=decoder["model.embed_tokens.weight"].shape[0],
        dtype=_dtype(dtype, decoder),
        decoder={k.removeprefix("model."): v for k, v in decoder.items() if k.startswith("model.")},
        head={"weight": decoder.get("lm_head.weight", decoder["model.embed_tokens.weight"])},
        encoders={
            name: {k.removeprefix(f"{key}."): v for k, v in vision.items() if k.startswith(f"{key}.")}
            for name, key in zip(names, featurizers)
            if any(k.startswith(f"{key}.") for k in vision)
        },
        projector=projector,
        where=folder,
    )
    for name, encoder in model.model.vision_tower.encoders.items():
        if not any(k.startswith(f"{list(featurizers)[names.index(name)]}.") for k in vision):
            encoder.load_pretrained()
    tokenizer = Path(language_model) if language_model else folder
    return model, _processor(tokenizer, model, "prismatic")


def _prismatic_text_config(decoder: Mapping[str, Tensor], language_model: str | None) -> Any:
    """Prismatic stores no LLM config: read it from ``language_model``, else from the weights' shapes (Llama, heads of 128)."""
    if language_model is not None:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(language_model).get_text_config()
        except OSError as error:
            raise UnavailableError(f"--language-model {language_model}: its config cannot be read") from error
    from transformers import LlamaConfig

    vocabulary, hidden = decoder["model.embed_tokens.weight"].shape
    head = 128
    if hidden % head:
        raise ConfigError(
            "the LLM's heads cannot be told from its weights; give --language-model with its config and tokenizer"
        )
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=decoder["model.layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in decoder if k.startswith("model.layers.")),
        num_attention_heads=hidden // head,
        num_key_value_heads=decoder["model.layers.0.self_attn.k_proj.weight"].shape[0] // head,
        rms_norm_eps=1e-5,
    )


# Shared steps ------------------------------------------------------------------------------------------------------------


def _assemble(
    spec: Mapping[str, Any],
    *,
    text: Any,
    image_token_id: int,
    dtype: torch.dtype,
    decoder: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    encoders: Mapping[str, Mapping[str, Tensor]],
    projector: Mapping[str, Tensor],
    where: Path,
) -> Any:
    """Our model with every weight of a foreign one put in place; a weight that is left over or missing is an error."""
    from mllm.connectors.build import connector_config
    from mllm.encoders.catalogue import encoder_config
    from mllm.models.configuration_mllm import MllmConfig
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    config = MllmConfig(
        text_config=text,
        encoders={name: encoder_config(value, where=f"encoders.{name}") for name, value in spec["encoders"].items()},
        connector=connector_config(dict(spec["connector"])),
        image_token_id=image_token_id,
        lm_head_bias="bias" in head,
        dtype=dtype,
    )
    model = MllmForConditionalGeneration(config).to(dtype)
    _fill(model.model.language_model, decoder, f"{where}: language model")
    _fill(model.lm_head, head, f"{where}: head")
    for name, state in encoders.items():
        # The encoder is cut after the layer it hands out, so a whole encoder has weights to spare.
        _fill(model.model.vision_tower.encoders[name].model, state, f"{where}: encoder {name}", spare=True)
    _fill(model.model.multi_modal_projector, projector, f"{where}: projector")
    model.tie_weights()
    return model.eval()


def _fill(module: nn.Module, state: Mapping[str, Tensor], where: str, *, spare: bool = False) -> None:
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(state))
    foreign = [] if spare else sorted(set(state) - set(wanted))
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or foreign or shapes:
        raise CheckpointError(
            f"{where}: missing [{_some(missing)}], left over [{_some(foreign)}], other shape [{_some(shapes)}]"
        )
    module.load_state_dict({k: state[k] for k in wanted})


def _processor(folder: Path, model: Any, template: str) -> Any:
    """The processor of a converted model, when its folder holds a tokenizer."""
    from transformers import AutoTokenizer

    from mllm.models.build import build_processor
    from mllm.recipe import ModelSpec

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    placeholder = (
        tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        if model.config.image_token_id < len(tokenizer)
        else None
    )
    spec = ModelSpec.model_validate(
        {
            "language_model": {"source": str(folder)},
            "chat_template": template,
            "image_token": placeholder or "<image>",
        }
    )
    processor = build_processor(spec, model.config, tokenizer)
    model.config.image_token_id = processor.image_token_id
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    return processor


def _preprocessing(folder: Path) -> dict[str, Any]:
    """Image settings of an HF image processor file, as encoder config."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            data = json.loads((folder / name).read_text(encoding="utf-8"))
            data = data.get("image_processor", data)
            if "image_mean" not in data:
                continue
            size = data.get("crop_size") or data.get("size") or {}
            if isinstance(size, int):
                size = {"height": size, "width": size}
            pixels = (size["height"], size["width"]) if "height" in size else (size.get("shortest_edge"),) * 2
            result = {"mean": data["image_mean"], "std": data["image_std"]}
            if pixels[0]:
                result["image_size"] = pixels
            result["resize"] = "crop" if data.get("do_center_crop") else "squash"
            return result
    return {}


def _activation(name: str, where: Path) -> str:
    known = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "silu": "silu", "relu": "relu"}
    if name not in known:
        raise ConfigError(f"{where}: projector activation {name!r} is not supported")
    return known[name]


def _dtype(dtype: Any, weights: Mapping[str, Tensor]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return next(iter(weights.values())).dtype if dtype in (None, "auto") else getattr(torch, dtype)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an HF folder: safetensors, else ``.bin`` read with ``weights_only``."""
    from safetensors.torch import load_file

    index = next(
        (
            folder / n
            for n in ("model.safetensors.index.json", "pytorch_model.bin.index.json")
            if (folder / n).is_file()
        ),
        None,
    )
    if index is not None:
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()][:1]
    if not files:
        raise CheckpointError(f"{folder}: no weights (model.safetensors or pytorch_model.bin)")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder}: shard {file.name} is missing; copy the folder again")
        tensors.update(load_file(file) if file.suffix == ".safetensors" else _read_pickle(file))
    return tensors


def _read_checkpoint(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A Prismatic checkpoint as part → tensors."""
    file = next(
        (folder / n for n in ("latest-checkpoint.safetensors", "latest-checkpoint.pt") if (folder / n).is_file()), None
    )
    if file is None:
        raise CheckpointError(f"{folder}: no latest-checkpoint.pt or .safetensors")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(file).items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        return parts
    data = _read_pickle(file)
    return data.get("model", data)


def _read_pickle(file: Path) -> Any:
    """A torch pickle that holds tensors only; anything else is refused."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file}: refused, it is not a plain tensor file ({str(error).splitlines()[0][:160]}). Convert it to safetensors where you "
            "trust its origin"
        ) from error


# Ours out ----------------------------------------------------------------------------------------------------------------


def export(checkpoint: str | Path, target: str | Path, *, dtype: str = "auto", shard_size: str = "5GB") -> Path:
    """One self-contained checkpoint: PEFT adapters merged, dtype chosen, sharded safetensors."""
    from transformers import AutoProcessor

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    checkpoint, target = Path(checkpoint), Path(target)
    if (target / "config.json").exists():
        raise ConfigError(f"{target} already holds a checkpoint; choose another folder")
    adapter = checkpoint / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else checkpoint
    model = MllmForConditionalGeneration.from_pretrained(base, dtype=dtype)
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()  # type: ignore[assignment]
    model.save_pretrained(target, max_shard_size=shard_size)
    source = (
        checkpoint
        if any((checkpoint / n).exists() for n in ("processor_config.json", "preprocessor_config.json"))
        else base
    )
    AutoProcessor.from_pretrained(source).save_pretrained(target)
    return target
