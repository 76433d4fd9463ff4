"""What does a LLaVA-1.5 checkpoint in its authors' own layout hold?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.models.foreign.checkpoint import ForeignCheckpoint, find_tokenizer
from mllm.models.foreign.parts import decoder_tensors, encoder_tensors, head_tensors, model_config, projector_tensors
from mllm.models.foreign.settings import ABOUT_THE_FILE, Settings, read_json, text_config
from mllm.models.foreign.tensors import Tensors, output_head
from mllm.models.weight_files import chosen_dtype, read_tensors

_LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
"""``model_type`` of the authors' layout → transformers' language model. MPT and others compute something else."""


def read_llava_original(folder: Path, dtype: Any) -> ForeignCheckpoint:
    """liuhaotian's layout: an LLM checkpoint with ``model.mm_projector.*``, the encoder by hub id."""
    from transformers import AutoConfig

    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    kind = settings.take("model_type", "llava")
    if kind not in _LANGUAGE_MODELS:
        raise ConfigError(
            f"{folder}: model_type {kind!r} is not supported; known: {', '.join(sorted(_LANGUAGE_MODELS))}"
        )
    text = text_config(settings, _LANGUAGE_MODELS[kind])
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
    settings.harmless("model_type", "mm_tunable_parts", "vision_tower_pretrained", *ABOUT_THE_FILE)
    return {"resize": "letterbox"} if shape == "pad" else {}
