"""What does a LLaVA-1.5 checkpoint hold, in transformers' layout and in the authors' own?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAssignmentType=false, reportPrivateImportUsage=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleVariableOverride=false, reportOptionalIterable=false

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.models.foreign.conversion import assemble, converted_processor
from mllm.models.weight_files import chosen_dtype, read_tensors


def read_llava(folder: Path, dtype: Any) -> tuple[Any, Any]:
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
    model = assemble(
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
    return model, converted_processor(folder, model, "vicuna")


def read_llava_original(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """liuhaotian's layout: an LLM checkpoint with ``model.mm_projector.*``, the encoder by hub id."""
    from transformers import AutoConfig, LlamaConfig

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("mm_projector_type", "linear") != "mlp2x_gelu":
        raise ConfigError(f"{folder}: mm_projector_type {config.get('mm_projector_type')!r}; LLaVA-1.5 has mlp2x_gelu")
    weights = read_tensors(folder)
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
    model = assemble(
        spec,
        text=text,
        image_token_id=text.vocab_size,
        dtype=chosen_dtype(dtype, weights),
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
    return model, converted_processor(folder, model, "vicuna")


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
