"""What does a checkpoint in transformers' own layout hold: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mllm.errors import CheckpointError, ConfigError
from mllm.models.foreign.checkpoint import ForeignCheckpoint, find_tokenizer
from mllm.models.foreign.parts import decoder_tensors, encoder_tensors, head_tensors, model_config, projector_tensors
from mllm.models.foreign.pictures import image_settings
from mllm.models.foreign.settings import ABOUT_THE_FILE, Settings, read_json
from mllm.models.foreign.tensors import Tensors, output_head
from mllm.models.weight_files import read_tensors, refuse_gaps
from mllm.noise import load_report_unless_told

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KINDS = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
"""``model_type`` → the class of transformers that reads it."""
_TEMPLATES = {"llama": "vicuna", "qwen2": "chatml", "qwen3": "chatml"}
"""Language model → how its prompts are written, where the checkpoint's own template asks for messages in parts."""
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
_BEFORE_THE_NORM = ("clip_vision_model", "siglip_vision_model", "internvl_vision")
"""Encoders whose last hidden state in transformers has not passed the final norm."""


@load_report_unless_told()
def read_hub_layout(folder: Path, kind: str, dtype: Any) -> ForeignCheckpoint:
    """A checkpoint of one of `KINDS`. transformers' own class reads the file, and says what it would have filled with random
    numbers."""
    import transformers

    _check_settings(folder, kind)
    reader = getattr(transformers, KINDS[kind])
    try:
        loaded: Any = reader.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot read this {kind} checkpoint: {error}") from error
    source, info = loaded
    refuse_gaps(str(folder), info)
    config, inner = source.config, source.model
    views = _views(config, kind, folder)
    ours = model_config(
        {"vision": _encoder(config, kind, folder)},
        _connector(config, kind, folder),
        text=config.text_config,
        image_token_id=config.image_token_id,
        head_bias=getattr(source.lm_head, "bias", None) is not None,
        dtype=source.dtype,
        views=views,
    )
    tensors = {
        **decoder_tensors(inner.language_model.state_dict()),
        **head_tensors(_head(source, folder)),
        **encoder_tensors(ours, "vision", inner.vision_tower.state_dict(), folder),
        **projector_tensors(_projector(inner, views)),
    }
    template = _TEMPLATES.get(config.text_config.model_type)
    return ForeignCheckpoint(
        ours, tensors, source.dtype, folder, template, find_tokenizer(folder), generation=source.generation_config
    )


def _encoder(config: PreTrainedConfig, kind: str, folder: Path) -> dict[str, Any]:
    layers = config.vision_feature_layer
    layers, tower = [layers] if isinstance(layers, int) else list(layers), config.vision_config.model_type
    depth = config.vision_config.num_hidden_layers
    last = any(layer in (-1, depth) for layer in layers)
    if last and tower not in _BEFORE_THE_NORM:
        raise ConfigError(
            f"{folder}: vision_feature_layer {config.vision_feature_layer} of a {tower} is not supported; the last layer is known of "
            f"{', '.join(_BEFORE_THE_NORM)}"
        )
    _check_class_token(config, tower, folder)
    grids = None if kind in ("llava", "internvl") else [list(size) for size in config.image_grid_pinpoints]
    return {
        "type": "hf",
        "architecture": config.vision_config.to_dict(),
        "layers": layers,
        # InternVL takes the model's output for -1, the LLaVA family a block's.
        "final_norm": kind == "internvl" and layers == [-1],
        **image_settings(folder, kind, grids=grids),
    }


def _check_class_token(config: PreTrainedConfig, tower: str, folder: Path) -> None:
    """Refuse a choice of tokens that drops a patch, or keeps what shows no place of the picture."""
    strategy = config.vision_feature_select_strategy
    without = tower.startswith("siglip")
    if strategy == "default" and without:
        raise ConfigError(
            f"{folder}: vision_feature_select_strategy: default drops the first token, which in a {tower} is a patch and no class "
            "token; ours drops no patch"
        )
    if strategy == "full" and not without:
        raise ConfigError(
            f"{folder}: this checkpoint keeps the class token among the visual tokens (vision_feature_select_strategy: full), which "
            "no connector of ours does"
        )


def _connector(config: PreTrainedConfig, kind: str, folder: Path) -> dict[str, Any]:
    activation = config.projector_hidden_act
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"{folder}: projector activation {activation!r} is not supported")
    plain = {
        "depth": 2,
        "activation": _ACTIVATIONS[activation],
        "bias": getattr(config, "multimodal_projector_bias", True),
    }
    if kind != "internvl":
        return {"type": "mlp", **plain}
    factor = round(1 / config.downsample_ratio)
    if abs(factor * config.downsample_ratio - 1) > 1e-6:
        raise ConfigError(f"{folder}: downsample_ratio {config.downsample_ratio} is no whole number of tokens a side")
    return {"type": "pixel_shuffle", "factor": factor, "projector": {**plain, "norm_before": "layer_norm"}}


def _projector(inner: Any, views: dict[str, Any] | None) -> dict[str, Tensor]:
    theirs = inner.multi_modal_projector
    if hasattr(theirs, "layer_norm"):
        places = {"projector.0": theirs.layer_norm, "projector.1": theirs.linear_1, "projector.3": theirs.linear_2}
    else:
        places = {"projector.0": theirs.linear_1, "projector.2": theirs.linear_2}
    tensors = {f"{place}.{name}": value for place, part in places.items() for name, value in part.state_dict().items()}
    if views is not None and views.get("dialect") == "llava_next":
        tensors["newline"] = inner.image_newline
    return tensors


def _head(source: Any, folder: Path) -> dict[str, Tensor]:
    """The output head, tied or not as the config says; whether the file holds one is looked up there."""
    config, embedding = source.config, source.get_input_embeddings().weight
    stored = Tensors(read_tensors(folder), folder)
    head = {
        k.rsplit(".", 1)[1]: v for n in ("language_model.", "") for k, v in stored.take(f"{n}lm_head.", to="x.").items()
    }
    tied = bool(
        getattr(config, "tie_word_embeddings", False) or getattr(config.text_config, "tie_word_embeddings", False)
    )
    return output_head(
        embedding.to("cpu"), {k: v.to(embedding.dtype) for k, v in head.items()}, tied=tied, where=folder
    )


def _views(config: PreTrainedConfig, kind: str, folder: Path) -> dict[str, Any] | None:
    if kind == "llava":
        return None
    if kind == "internvl":
        return _internvl_tiles(folder)
    side = config.vision_config.image_size
    broken = [list(size) for size in config.image_grid_pinpoints if size[0] % side or size[1] % side]
    if broken:
        raise ConfigError(f"{folder}: image_grid_pinpoints {broken[0]} is no multiple of the encoder's {side} pixels")
    views = {
        "type": "tiles",
        "dialect": "llava_next",
        "grids": [(height // side, width // side) for height, width in config.image_grid_pinpoints],
    }
    if kind == "llava_next":
        return views
    most = re.fullmatch(r"anyres_max_([1-9]\d*)", config.vision_aspect_ratio)
    if most is None:
        raise ConfigError(
            f"{folder}: vision_aspect_ratio {config.vision_aspect_ratio!r} is not supported: expected anyres_max_N"
        )
    return {**views, "max_joined": int(most[1]), "several": "whole"}


def _internvl_tiles(folder: Path) -> dict[str, Any]:
    """InternVL's tiles, whose number the image processor's file says, between tokens that the tokenizer names."""
    from transformers import AutoTokenizer

    from mllm.models.foreign.pictures import processor_settings

    settings = processor_settings(folder) or {}
    place = find_tokenizer(folder)
    tokenizer = None if place is None else AutoTokenizer.from_pretrained(place)
    names = {key: getattr(tokenizer, f"{word}_image_token", None) for key, word in (("begin", "start"), ("end", "end"))}
    if tokenizer is None or not all(names.values()):
        raise CheckpointError(
            f"{folder}: an InternVL checkpoint needs its tokenizer, which names the tokens around a picture (start_image_token, "
            "end_image_token in tokenizer_config.json); copy it into the folder"
        )
    return {
        "type": "tiles",
        "dialect": "internvl",
        "min_tiles": settings.get("min_patches", 1),
        "max_tiles": settings.get("max_patches", 12),
        "marks": names,
        "mark_ids": {key: tokenizer.convert_tokens_to_ids(name) for key, name in sorted(names.items())},
    }


def _check_settings(folder: Path, kind: str) -> None:
    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    settings.expect("vision_feature_select_strategy", ("default", "full", None), "ours drops the class token")
    settings.harmless("model_type", "vision_config", "text_config", "image_token_(index|id)", "projector_hidden_act")
    settings.harmless("vision_feature_layer", "multimodal_projector_bias", "image_seq_length", "tie_word_embeddings")
    if kind in ("llava_next", "llava_onevision"):
        settings.harmless("image_grid_pinpoints")
        settings.expect("use_image_newline_parameter", (True, None), "rows of tiles are closed by a learned newline")
    if kind == "llava_onevision":
        settings.harmless("vision_aspect_ratio", "video_token_(index|id)")
    if kind == "internvl":
        settings.harmless("downsample_ratio")
    settings.harmless(*ABOUT_THE_FILE)
    settings.finish()
