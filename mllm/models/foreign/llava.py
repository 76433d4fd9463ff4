"""What does a LLaVA checkpoint hold: 1.5 in transformers' layout and in the authors' own, NeXT in transformers'?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.models.foreign.checkpoint import ForeignCheckpoint, find_tokenizer
from mllm.models.foreign.parts import decoder_tensors, encoder_tensors, head_tensors, model_config, projector_tensors
from mllm.models.foreign.pictures import image_settings
from mllm.models.foreign.settings import Settings, read_json
from mllm.models.foreign.tensors import Tensors, output_head
from mllm.models.weight_files import chosen_dtype, read_tensors, refuse_gaps

_LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
"""``model_type`` of the authors' layout → transformers' language model. MPT and others compute something else."""
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}


def read_llava(folder: Path, dtype: Any, *, tiles: bool = False) -> ForeignCheckpoint:
    """transformers' layout, of LLaVA-NeXT where it looks at ``tiles``. Its own class reads the file, and says what it would
    have filled with random numbers."""
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    _check_hf_settings(folder, tiles)
    reader = LlavaNextForConditionalGeneration if tiles else LlavaForConditionalGeneration
    try:
        loaded: Any = reader.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot read this LLaVA checkpoint: {error}") from error
    source, info = loaded
    refuse_gaps(str(folder), info)
    config = source.config
    layers = config.vision_feature_layer
    stored = Tensors(read_tensors(folder), folder)
    head = {
        k.rsplit(".", 1)[1]: v for n in ("language_model.", "") for k, v in stored.take(f"{n}lm_head.", to="x.").items()
    }
    embedding = source.get_input_embeddings().weight
    inner, tower = source.model, source.model.vision_tower.state_dict()
    projector = {
        f"projector.{ours}.{kind}": tensor
        for ours, theirs in ((0, inner.multi_modal_projector.linear_1), (2, inner.multi_modal_projector.linear_2))
        for kind, tensor in theirs.state_dict().items()
    }
    encoder = {
        "type": "hf",
        "architecture": config.vision_config.to_dict(),
        "layers": [layers] if isinstance(layers, int) else list(layers),
        **image_settings(folder, grids=[list(s) for s in config.image_grid_pinpoints] if tiles else None),
    }
    connector = {
        "type": "mlp",
        "depth": 2,
        "activation": _activation(config.projector_hidden_act, folder),
        "bias": getattr(config, "multimodal_projector_bias", True),
    }
    tied = bool(
        getattr(config, "tie_word_embeddings", False) or getattr(config.text_config, "tie_word_embeddings", False)
    )
    head = output_head(
        embedding.to("cpu"), {k: v.to(embedding.dtype) for k, v in head.items()}, tied=tied, where=folder
    )
    ours = model_config(
        {"vision": encoder},
        connector,
        text=config.text_config,
        image_token_id=config.image_token_id,
        head_bias="bias" in head,
        dtype=source.dtype,
        views=_tiles(config, folder) if tiles else None,
    )
    if tiles:
        projector["newline"] = inner.image_newline
    tensors = {
        **decoder_tensors(inner.language_model.state_dict()),
        **head_tensors(head),
        **encoder_tensors(ours, "vision", tower, folder),
        **projector_tensors(projector),
    }
    return ForeignCheckpoint(
        ours, tensors, source.dtype, folder, "vicuna", find_tokenizer(folder), generation=source.generation_config
    )


def _tiles(config: Any, folder: Path) -> dict[str, Any]:
    """LLaVA-NeXT's ``image_grid_pinpoints`` as views. Raises `ConfigError` for one that is no whole number of tiles."""
    side = config.vision_config.image_size
    broken = [list(size) for size in config.image_grid_pinpoints if size[0] % side or size[1] % side]
    if broken:
        raise ConfigError(f"{folder}: image_grid_pinpoints {broken[0]} is no multiple of the encoder's {side} pixels")
    return {
        "type": "tiles",
        "grids": [(height // side, width // side) for height, width in config.image_grid_pinpoints],
    }


def read_llava_original(folder: Path, dtype: Any) -> ForeignCheckpoint:
    """liuhaotian's layout: an LLM checkpoint with ``model.mm_projector.*``, the encoder by hub id."""
    from transformers import AutoConfig

    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    text = _text_config(settings, folder)
    vision = settings.take("mm_vision_tower")
    resize = _check_original_settings(settings)
    trained_tower = bool(settings.take("unfreeze_mm_vision_tower"))
    layer = settings.take("mm_vision_select_layer", -2)
    settings.finish()
    try:
        architecture = AutoConfig.from_pretrained(vision)
    except OSError as error:
        raise UnavailableError(
            f"{folder}: its encoder {vision!r} cannot be read; put a local path into mm_vision_tower"
        ) from error
    architecture = getattr(architecture, "vision_config", architecture)
    stored = Tensors(read_tensors(folder), folder)
    decoder = {
        k: v for part in ("layers.", "embed_tokens.", "norm.") for k, v in stored.take(f"model.{part}", to=part).items()
    }
    if "embed_tokens.weight" not in decoder:
        raise CheckpointError(f"{folder}: model.embed_tokens.weight is missing; a shard may be absent: copy it again")
    head = output_head(
        decoder["embed_tokens.weight"], stored.take("lm_head."), tied=bool(text.tie_word_embeddings), where=folder
    )
    projector = stored.take("model.mm_projector.", to="projector.")
    tower = {
        **stored.take("model.vision_tower.vision_tower.vision_model."),
        **stored.take("model.vision_tower.vision_tower."),
    }
    stored.finish()
    if trained_tower and not tower:
        raise CheckpointError(
            f"{folder}: its config says that the encoder was trained (unfreeze_mm_vision_tower), but the file holds none of its "
            "weights; the published encoder would be another one. Copy the checkpoint again"
        )
    chosen = chosen_dtype(dtype, decoder)
    encoder = {"type": "hf", "architecture": architecture.to_dict(), "layers": [layer], "weights": {"source": vision}}
    ours = model_config(
        {"vision": {**encoder, **resize}},
        {"type": "mlp", "depth": 2},
        text=text,
        image_token_id=text.vocab_size,
        head_bias="bias" in head,
        dtype=chosen,
    )
    tensors = {**decoder_tensors(decoder), **head_tensors(head), **projector_tensors(projector)}
    if tower:
        tensors |= encoder_tensors(ours, "vision", tower, folder)
    unread = () if tower else ("vision",)
    return ForeignCheckpoint(ours, tensors, chosen, folder, "vicuna", find_tokenizer(folder), unread)


def _check_hf_settings(folder: Path, tiles: bool) -> None:
    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    if settings.take("vision_feature_select_strategy", "default") == "full":
        raise ConfigError(
            f"{folder}: this checkpoint keeps the class token among the visual tokens (vision_feature_select_strategy: full), which "
            "no connector of ours does"
        )
    settings.expect("vision_feature_select_strategy", ("default", None), "ours drops the class token")
    settings.harmless("model_type", "vision_config", "text_config", "image_token_(index|id)", "projector_hidden_act")
    settings.harmless("vision_feature_layer", "multimodal_projector_bias", "image_seq_length", "tie_word_embeddings")
    if tiles:
        settings.harmless("image_grid_pinpoints")
        settings.expect("use_image_newline_parameter", (True, None), "rows of tiles are closed by a learned newline")
    settings.harmless(*_ABOUT_THE_FILE)
    settings.finish()


_ABOUT_THE_FILE = (
    "architectures",
    "transformers_version",
    "(torch_)?dtype",
    "_name_or_path",
    "_commit_hash",
    "auto_map",
    "ignore_index",
    "(pad|bos|eos|unk)_token_id",
    "vocab_size",
    "hidden_size",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_(hidden_states|attentions)",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
)
"""Keys that say nothing about what is computed from inputs."""


def _check_original_settings(settings: Settings) -> dict[str, Any]:
    """Refuse what our model cannot honour. Returns how pictures are fitted, as encoder config."""
    tiles = "tiles are read from checkpoints of transformers' LLaVA-NeXT only"
    settings.expect("mm_projector_type", ("mlp2x_gelu",), "LLaVA-1.5 has mlp2x_gelu")
    settings.expect("mm_vision_select_feature", ("patch", None), "the class token would be one more visual token")
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        settings.expect(key, (False, None), "tokens around the picture that our prompts do not write")
    settings.expect("mm_patch_merge_type", ("flat", None), tiles)
    settings.expect("use_mm_proj", (True, None), "a model without projector")
    settings.expect("mm_resampler_type", (None,), "a resampler between encoder and projector")
    for key in ("s2", "s2_scales", "mm_use_s2", "mm_spatial_pool_mode", "mm_newline_position"):
        settings.expect(key, (None, False), "another way of looking at the picture")
    shape = settings.expect("image_aspect_ratio", ("pad", "square", None), tiles)
    settings.harmless("mm_hidden_size", "mm_vision_tower_lr", "mm_projector_lr", "pretrain_mm_mlp_adapter")
    settings.harmless("(tune|freeze)_mm_.*", "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution")
    settings.harmless("tokenizer_(padding_side|model_max_length)", "max_sequence_length", "pretraining_tp")
    settings.harmless("model_type", "mm_tunable_parts", "vision_tower_pretrained", *_ABOUT_THE_FILE)
    return {"resize": "letterbox"} if shape == "pad" else {}


def _text_config(settings: Settings, folder: Path) -> Any:
    from transformers import AutoConfig

    kind = settings.take("model_type", "llava")
    if kind not in _LANGUAGE_MODELS:
        raise ConfigError(
            f"{folder}: model_type {kind!r} is not supported; known: {', '.join(sorted(_LANGUAGE_MODELS))}"
        )
    blank = AutoConfig.for_model(_LANGUAGE_MODELS[kind])
    known = {*blank.to_dict(), "rope_theta", "rope_scaling", "head_dim"} - {"model_type", "architectures"}
    return AutoConfig.for_model(
        _LANGUAGE_MODELS[kind], **{key: settings.take(key) for key in sorted(known) if key in settings}
    )


def _activation(name: str, where: Path) -> str:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{where}: projector activation {name!r} is not supported")
    return _ACTIVATIONS[name]
