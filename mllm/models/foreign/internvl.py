"""What does an InternVL checkpoint in its authors' own layout (``internvl_chat``) hold?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.errors import CheckpointError, ConfigError
from mllm.models.foreign.checkpoint import ForeignCheckpoint, find_tokenizer
from mllm.models.foreign.parts import decoder_tensors, encoder_tensors, head_tensors, model_config, projector_tensors
from mllm.models.foreign.settings import ABOUT_THE_FILE, Settings, read_json, text_config
from mllm.models.foreign.tensors import Tensors, output_head
from mllm.models.weight_files import chosen_dtype, read_tensors

_LANGUAGE_MODELS = {
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The authors' class → transformers' language model. InternLM2 is a Llama whose three projections lie in one tensor."""
_TEMPLATES = {"internvl2_5": "chatml"}
"""The authors' prompt format → ours. Others close turns otherwise: there the tokenizer's own template, or ``--chat-template``."""
_TOKENS = {"begin": "<img>", "end": "</img>", "context": "<IMG_CONTEXT>"}
_VISION = (
    (r"embeddings\.class_embedding", "embeddings.cls_token"),
    (r"embeddings\.position_embedding", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"encoder\.layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.ls([12])", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
)
"""The authors' names of the encoder's weights → transformers'."""
_INTERNLM2 = (
    (r"tok_embeddings\.", "embed_tokens."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)
"""InternLM2's names → Llama's."""
_GENERATION = (
    "(max|min)_length|max_new_tokens|do_sample|early_stopping|num_beam.*|diversity_penalty|temperature|top_[kp]|typical_p",
    "repetition_penalty|length_penalty|.*no_repeat_ngram_size|num_return_sequences|bad_words_ids|.*_bos_token_id|.*_eos_token_id",
    "finetuning_task|task_specific_params|sep_token_id|decoder_start_token_id|prefix|torchscript|use_bfloat16|tf_legacy_loss",
    "pruned_heads|tie_encoder_decoder|is_decoder|add_cross_attention|cross_attention_hidden_size|begin_suppress_tokens",
    "suppress_tokens|exponential_decay_length_penalty|remove_invalid_values|output_scores|return_dict_in_generate",
    "tokenizer_class|_?attn_implementation(_autoset)?|use_flash_attn|initializer_(range|factor)|drop_path_rate|model_type",
)
"""What older libraries wrote into every config, and what says how fast or how trained."""


def read_internvl_chat(folder: Path, dtype: Any) -> ForeignCheckpoint:
    """InternVL 2 to 3.5 as OpenGVLab publishes it: InternViT, pixel shuffle (``ps_version: v2``), an MLP, and Qwen, Llama or InternLM2.

    The authors put a system message before every conversation that none of ours holds; give it as one.
    """
    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    language = dict(settings.take("llm_config") or {})
    kind = (language.get("architectures") or [None])[0]
    if kind not in _LANGUAGE_MODELS:
        raise ConfigError(
            f"{folder}: llm_config.architectures: {kind!r} is not supported; known: {', '.join(_LANGUAGE_MODELS)}"
        )
    inner = Settings(language, folder / "config.json: llm_config")
    text = text_config(inner, _LANGUAGE_MODELS[kind])
    if kind == "InternLM2ForCausalLM":
        inner.expect("bias", (False, None), "InternLM2's projections have none")
    inner.harmless(*_GENERATION, *ABOUT_THE_FILE)
    inner.finish()
    vision = _vision_config(Settings(dict(settings.take("vision_config") or {}), folder / "config.json: vision_config"))
    ids = _token_ids(folder)
    views, connector, layer = _views(settings, ids), _connector(settings, folder), settings.take("select_layer", -1)
    if settings.take("force_image_size") not in (None, vision["image_size"]):
        raise ConfigError(
            f"{folder}: force_image_size is not supported where the encoder has another ({vision['image_size']})"
        )
    template = _TEMPLATES.get(settings.take("template"))
    settings.expect("pad2square", (False, None), "ours squashes tiles to the encoder's size")
    for key in ("use_backbone_lora", "use_llm_lora"):
        settings.expect(key, (0, None), "merge the adapter first")
    settings.harmless("model_type", "hidden_size", "tie_word_embeddings", "dynamic_image_size", *ABOUT_THE_FILE)
    settings.finish()
    stored = Tensors(read_tensors(folder), folder)
    decoder = stored.take("language_model.model.")
    head = stored.take("language_model.lm_head.") or stored.take("language_model.output.")
    if kind == "InternLM2ForCausalLM":
        decoder = _as_llama(decoder, text)
    if "embed_tokens.weight" not in decoder:
        raise CheckpointError(f"{folder}: language_model has no token embedding; a shard may be absent: copy it again")
    tower = {_renamed(key, _VISION): value for key, value in stored.take("vision_model.").items()}
    projector = stored.take("mlp1.", to="projector.")
    stored.finish()
    head = output_head(decoder["embed_tokens.weight"], head, tied=bool(text.tie_word_embeddings), where=folder)
    chosen = chosen_dtype(dtype, decoder)
    ours = model_config(
        {
            "vision": {
                "type": "hf",
                "architecture": vision,
                "layers": [layer],
                "final_norm": layer == -1,
                "image_size": vision["image_size"],
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "resize": "squash",
                "interpolation": "bicubic",
            }
        },
        connector,
        text=text,
        image_token_id=ids["context"],
        head_bias="bias" in head,
        dtype=chosen,
        views=views,
    )
    tensors = {
        **decoder_tensors(decoder),
        **head_tensors(head),
        **encoder_tensors(ours, "vision", _split_projections(tower), folder),
        **projector_tensors(projector),
    }
    return ForeignCheckpoint(ours, tensors, chosen, folder, template, find_tokenizer(folder))


def _vision_config(settings: Settings) -> dict[str, Any]:
    """InternViT's settings in transformers' words."""
    size = settings.take("image_size", 224)
    found = {
        "model_type": "internvl_vision",
        "image_size": size,
        "patch_size": settings.take("patch_size", 14),
        "hidden_size": settings.take("hidden_size", 3200),
        "num_hidden_layers": settings.take("num_hidden_layers", 48),
        "num_attention_heads": settings.take("num_attention_heads", 25),
        "intermediate_size": settings.take("intermediate_size", 12800),
        "num_channels": settings.take("num_channels", 3),
        "use_qk_norm": settings.take("qk_normalization", True),
        "attention_bias": settings.take("qkv_bias", False),
        "norm_type": settings.take("norm_type", "rms_norm"),
        "layer_norm_eps": settings.take("layer_norm_eps", 1e-6),
        "hidden_act": settings.take("hidden_act", "gelu"),
        "attention_dropout": settings.take("attention_dropout", 0.0),
        "projection_dropout": settings.take("dropout", 0.0),
        "layer_scale_init_value": settings.take("initializer_factor", 0.1),
    }
    settings.harmless(*_GENERATION, *ABOUT_THE_FILE)
    settings.finish()
    return found


def _connector(settings: Settings, folder: Path) -> dict[str, Any]:
    settings.expect("ps_version", ("v2",), "v1 transposes the picture's tokens")
    ratio = settings.take("downsample_ratio", 0.5)
    factor = round(1 / ratio)
    if abs(factor * ratio - 1) > 1e-6:
        raise ConfigError(f"{folder}: downsample_ratio {ratio} is no whole number of tokens a side")
    return {"type": "pixel_shuffle", "factor": factor, "projector": {"depth": 2, "norm_before": "layer_norm"}}


def _views(settings: Settings, ids: Mapping[str, int]) -> dict[str, Any]:
    """Tiles between ``<img>`` and ``</img>``; a model without dynamic size sees one."""
    least, most = settings.take("min_dynamic_patch", 1), settings.take("max_dynamic_patch", 6)
    thumbnail, dynamic = bool(settings.take("use_thumbnail")), bool(settings.take("dynamic_image_size"))
    return {
        "type": "tiles",
        "dialect": "internvl",
        "min_tiles": least if dynamic else 1,
        "max_tiles": most if dynamic else 1,
        "thumbnail": thumbnail,
        "marks": {key: _TOKENS[key] for key in ("begin", "end")},
        "mark_ids": {key: ids[key] for key in ("begin", "end")},
    }


def _token_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokens in and around a picture, from the tokenizer's files alone: InternLM2's class is code of the authors' own."""
    known: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        known |= read_json(folder / "added_tokens.json")
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        known |= {entry["content"]: int(number) for number, entry in added.items()}
    if (folder / "tokenizer.json").is_file():
        known |= {entry["content"]: entry["id"] for entry in read_json(folder / "tokenizer.json")["added_tokens"]}
    missing = [name for name in _TOKENS.values() if name not in known]
    if missing:
        raise CheckpointError(
            f"{folder}: an InternVL checkpoint needs its tokenizer's files, which say the id of {missing[0]} (added_tokens.json, "
            "tokenizer_config.json or tokenizer.json); copy them into the folder"
        )
    return {key: known[name] for key, name in _TOKENS.items()}


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _split_projections(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor of queries, keys and values, end to end → three."""
    found = {}
    for name, value in tower.items():
        if ".attention.qkv." not in name:
            found[name] = value
            continue
        for part, piece in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
            found[name.replace(".qkv.", f".{part}.")] = piece
    return found


def _as_llama(decoder: Mapping[str, Tensor], text: Any) -> dict[str, Tensor]:
    """InternLM2's decoder as a Llama's: its ``wqkv`` holds, for each key head, the queries that share it, its key and its value."""
    groups = text.num_key_value_heads
    shared = text.num_attention_heads // groups
    found = {}
    for name, value in decoder.items():
        if ".attention.wqkv." not in name:
            found[_renamed(name, _INTERNLM2)] = value
            continue
        heads = value.unflatten(0, (groups, shared + 2, -1))
        parts = (heads[:, :shared], heads[:, -2:-1], heads[:, -1:])
        for part, piece in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            found[name.replace(".attention.wqkv.", f".self_attn.{part}.")] = torch.clone(piece).flatten(0, 2)
    return found
