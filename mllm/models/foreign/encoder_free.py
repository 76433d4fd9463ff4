"""What does a checkpoint of a model without vision encoder hold, in its authors' layout: EVE, EVEv2, SOLO?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mllm.errors import CheckpointError, ConfigError
from mllm.models.foreign.checkpoint import ForeignCheckpoint, find_tokenizer
from mllm.models.foreign.parts import decoder_tensors, head_tensors, model_config, projector_tensors
from mllm.models.foreign.settings import ABOUT_THE_FILE, Settings, read_json, text_config
from mllm.models.foreign.tensors import Tensors, output_head
from mllm.models.weight_files import chosen_dtype, read_tensors

_TEACHER = ("model.vision_clip.", "model.vision_tower_compressor.")
"""EVE's frozen teacher and the layer that compares with it: only training uses them."""
_SWITCHED = re.compile(
    r"(layers\.\d+\.(?:self_attn\.)?)(moe_)?"
    r"(input_layernorm|post_attention_layernorm|mlp|q_proj|k_proj|v_proj|o_proj)\.(.+)"
)
_SOLO_IDS = {"<vision>": 32000, "<vpatch>": 32001, "<vrow_sep>": 32002}
"""As published, for a checkpoint without tokenizer."""
_SOLO_VOCABULARY = 33031
_SOLO_TEMPLATE = Path(__file__).with_name("solo.jinja")
"""Not among the shipped templates: pictures stand before the turn that asks about them, where no router would find its question."""


def read_eve(folder: Path, dtype: Any) -> ForeignCheckpoint:
    """EVE (arXiv 2406.11832): the patch embedding layer, an MLP, Vicuna. The teacher's layers are left out."""
    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    text = text_config(settings, "llama")
    settings.expect("mm_projector_type", ("mlp2x_gelu",), "EVE has mlp2x_gelu")
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        settings.expect(key, (False, None), "tokens around the picture that our prompts do not write")
    pixels, image = _eve_pixels(folder, str(settings.take("mm_vision_tower")))
    _harmless(settings)
    stored = Tensors(read_tensors(folder), folder)
    for prefix in _TEACHER:
        stored.take(prefix)
    layer, projector = stored.take("model.vision_tower.", to="layer."), stored.take("model.mm_projector.")
    decoder, head = _language_model(stored, text, folder)
    stored.finish()
    width, patch = _shape(layer, "layer.patch_embedding.weight", folder)[0::2][:2]
    if patch != pixels["patch_stride"]:
        raise CheckpointError(
            f"{folder}: patches of {patch} pixels in the weights and {pixels['patch_stride']} in its settings"
        )
    chosen = chosen_dtype(dtype, decoder)
    encoder = {"type": "eve", "width": width, "patch_size": patch, "stride": pixels["conv_stride"], **image}
    side = pixels["image_size"] // (patch * pixels["conv_stride"]) * patch * pixels["conv_stride"]
    ours = model_config(
        {"patches": {**encoder, "image_size": side}},
        {"type": "mlp", "depth": 2},
        text=text,
        image_token_id=text.vocab_size,
        head_bias="bias" in head,
        dtype=chosen,
        views={"type": "native", "rule": "eve", "max_side": pixels["image_size"]},
    )
    tensors = {
        **decoder_tensors(decoder),
        **head_tensors(head),
        **projector_tensors({f"projector.{key}": value for key, value in projector.items()}),
        **{f"model.vision_tower.encoders.patches.{key}": value for key, value in layer.items()},
    }
    return ForeignCheckpoint(ours, tensors, chosen, folder, "vicuna", find_tokenizer(folder))


def read_evev2(folder: Path, dtype: Any) -> ForeignCheckpoint:
    """EVEv2 (arXiv 2502.06788): two convolutions, and a Qwen2 with weights of its own for visual tokens."""
    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    text = text_config(settings, "qwen2")
    switched = bool(settings.take("add_moe"))
    parts = str(settings.take("moe_part") or "")
    if switched and not all(part in parts for part in ("layernorm", "self_attn", "mlp")):
        raise ConfigError(
            f"{folder}: moe_part: {parts!r} is not supported: ours has weights of their own for layernorm, self_attn and mlp together"
        )
    max_side, image = _evev2_pixels(folder, str(settings.take("mm_vision_tower")))
    _harmless(settings)
    stored = Tensors(read_tensors(folder), folder)
    first, second = (stored.take(f"model.vision_tower.patch_embedding.{n}.") for n in (0, 2))
    marks = stored.take("model.vision_tower.")
    decoder, head = _language_model(stored, text, folder)
    stored.finish()
    if sorted(marks) != ["split_embedding", "start_embedding"]:
        raise CheckpointError(
            f"{folder}: model.vision_tower holds {sorted(marks)} beside its convolutions, expected split_embedding and start_embedding"
        )
    patch, factor = _shape(first, "weight", folder)[-1], _shape(second, "weight", folder)[-1]
    cells = (max_side // (patch * factor)) ** 2
    chosen = chosen_dtype(dtype, decoder)
    ours = model_config(
        {
            "patches": {
                "type": "patch_conv",
                "width": first["weight"].shape[0],
                "patch_size": patch,
                "image_size": max_side // (patch * factor) * patch * factor,
                **image,
            }
        },
        {"type": "pixel_shuffle", "factor": factor, "projector": {"depth": 1}},
        text=text,
        image_token_id=text.vocab_size,
        head_bias="bias" in head,
        dtype=chosen,
        # The authors have no budget: sides rounded up make a picture exceed max_side², a strip of 1 : 150 by half.
        views={
            "type": "native",
            "rule": "evev2",
            "max_side": max_side,
            "newlines": True,
            "opening": True,
            "max_patches": cells * factor**2 * 3 // 2,
        },
        modality_switch=switched,
    )
    # A convolution over factor × factor cells is a linear layer over the cells, one after another, each with its channels.
    linear = {**second, "weight": second["weight"].permute(0, 2, 3, 1).flatten(1)}
    tensors = {
        **decoder_tensors(_modalities(decoder) if switched else decoder),
        **head_tensors(head),
        **projector_tensors({f"projector.0.{key}": value for key, value in linear.items()}),
        **projector_tensors({"newline": marks["split_embedding"], "opening": marks["start_embedding"]}),
        **{f"model.vision_tower.encoders.patches.layer.{key}": value for key, value in first.items()},
    }
    return ForeignCheckpoint(ours, tensors, chosen, folder, "vicuna", find_tokenizer(folder))


def read_solo(folder: Path, dtype: Any) -> ForeignCheckpoint:
    """SOLO (arXiv 2407.06438): patches through one linear layer, added to ``<vpatch>``'s own embedding, into a Mistral.

    Pictures end with ``<vision>``, as in the authors' training and examples.
    """
    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    text = text_config(settings, "mistral")
    patch = settings.take("vision_patch_size", 32)
    settings.harmless("model_type", *ABOUT_THE_FILE)
    settings.finish()
    stored = Tensors(read_tensors(folder), folder)
    linear = stored.take("model.embed_vision_patch.")
    decoder, head = _language_model(stored, text, folder)
    stored.finish()
    if _shape(linear, "weight", folder)[1] != 3 * patch * patch:
        raise CheckpointError(
            f"{folder}: model.embed_vision_patch.weight reads {linear['weight'].shape[1]} numbers, patches of {patch} pixels have "
            f"{3 * patch * patch}"
        )
    ids = _solo_ids(folder, text.vocab_size)
    chosen = chosen_dtype(dtype, decoder)
    marks = {"begin": "<vision>", "row": "<vrow_sep>", "end": "<vision>"}
    ours = model_config(
        {
            "patches": {
                "type": "raw_patches",
                "patch_size": patch,
                "image_size": 32 * patch,
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "interpolation": "bilinear",
            }
        },
        {"type": "linear"},
        text=text,
        image_token_id=ids["<vpatch>"],
        head_bias="bias" in head,
        dtype=chosen,
        views={
            "type": "native",
            "rule": "solo",
            "max_side": 32 * patch,
            "marks": marks,
            "mark_ids": {key: ids[name] for key, name in sorted(marks.items())},
        },
    )
    projector = {
        "projector.0.weight": linear["weight"],
        "projector.0.bias": decoder["embed_tokens.weight"][ids["<vpatch>"]].clone(),
    }
    tensors = {**decoder_tensors(decoder), **head_tensors(head), **projector_tensors(projector)}
    return ForeignCheckpoint(ours, tensors, chosen, folder, str(_SOLO_TEMPLATE), find_tokenizer(folder))


def _language_model(stored: Tensors, text: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Decoder and output head."""
    parts = ("layers.", "embed_tokens.", "norm.")
    decoder = {key: value for part in parts for key, value in stored.take(f"model.{part}", to=part).items()}
    if "embed_tokens.weight" not in decoder:
        raise CheckpointError(f"{folder}: model.embed_tokens.weight is missing; a shard may be absent: copy it again")
    tied = bool(text.tie_word_embeddings)
    return decoder, output_head(decoder["embed_tokens.weight"], stored.take("lm_head."), tied=tied, where=folder)


def _modalities(decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EVEv2's decoder under our names: a part and its ``moe_`` twin are one switch's ``text`` and ``visual``."""
    found = {}
    for name, value in decoder.items():
        part = _SWITCHED.fullmatch(name)
        if part is not None:
            name = f"{part[1]}{part[3]}.{'visual' if part[2] else 'text'}.{part[4]}"
        found[name] = value
    return found


def _harmless(settings: Settings) -> None:
    """What EVE's configs say about training and about the teacher alone."""
    settings.harmless("mm_hidden_size", "mm_vision_tower_clip", "requires_cliploss", "mm_vision_select_(layer|feature)")
    settings.harmless("use_mm_proj", "(tune|freeze)_.*", "image_aspect_ratio", "image_grid_pinpoints", "model_type")
    settings.harmless("tokenizer_(padding_side|model_max_length)", "max_sequence_length", "mm_projector_lr")
    settings.harmless("vision_tower(_clip)?(_lr)?", "pretrain_mm_mlp_adapter", "pretraining_tp", *ABOUT_THE_FILE)
    settings.finish()


def _eve_pixels(folder: Path, tower: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Numbers of EVE's image processor, by its file or its name, and mean and deviation as encoder config. Raises
    `ConfigError` for one whose pictures would be others."""
    found = _preprocessor(folder, tower)
    if found is None:
        name = re.search(r"patch(\d+)-anypixel-(\d+)", tower)
        if name is None:
            raise _unknown_tower(folder, tower, "eve-patch14-anypixel-672")
        return {"patch_stride": int(name[1]), "conv_stride": 2, "image_size": int(name[2])}, {}
    file, settings = found
    settings.expect("image_size_clip", (336,), "EVE's sizes are multiples of those of 336 pixels")
    settings.expect("patch_stride_clip", (14,), "EVE's shorter sides are whole patches of 14 pixels at 336")
    pixels = {key: settings.take(key) for key in ("patch_stride", "conv_stride", "image_size")}
    wrong = [key for key, value in pixels.items() if not isinstance(value, int)]
    if wrong:
        raise ConfigError(f"{file}: {wrong[0]}: {pixels[wrong[0]]!r} is not supported: expected a whole number")
    return pixels, _normalisation(settings)


def _evev2_pixels(folder: Path, tower: str) -> tuple[int, dict[str, Any]]:
    """Side of the square whose area pictures are brought to; mean and deviation as encoder config."""
    found = _preprocessor(folder, tower)
    if found is None:
        name = re.search(r"anyratio-res(\d+)-patch\d+", tower)
        if name is None:
            raise _unknown_tower(folder, tower, "eve-anyratio-res1600-patch16")
        return int(name[1]), {}
    settings = found[1]
    side = settings.take("max_size")
    settings.harmless("(patch|dense)_stride")  # the convolutions' own shapes say them
    return int(side), _normalisation(settings)


def _preprocessor(folder: Path, tower: str) -> tuple[Path, Settings] | None:
    """The image processor's file: in the folder, or where the model's ``mm_vision_tower`` points from it or from here."""
    places = (folder, folder / tower, Path(tower))
    file = next((p / "preprocessor_config.json" for p in places if (p / "preprocessor_config.json").is_file()), None)
    return None if file is None else (file, Settings(read_json(file), file))


def _normalisation(settings: Settings) -> dict[str, Any]:
    settings.expect("do_center_crop", (False, None), "EVE crops nothing")
    settings.expect("do_resize", (False, None), "EVE resizes pictures itself")
    settings.expect("do_normalize", (True, None), "ours normalises")
    settings.expect("do_rescale", (True, None), "ours divides by 255")
    mean, std = settings.take("image_mean"), settings.take("image_std")
    settings.harmless("feature_extractor_type", "image_processor_type", "processor_class", "resample", "size")
    settings.harmless("crop_size", "do_convert_rgb", "rescale_factor", "image_size_clip", "patch_stride_clip")
    settings.finish()
    return {"mean": mean, "std": std} if mean is not None and std is not None else {}


def _unknown_tower(folder: Path, tower: str, known: str) -> ConfigError:
    return ConfigError(
        f"{folder}: how pictures are resized is not known: no preprocessor_config.json here or in {tower!r}, and that name says no "
        f"size as {known!r} does; copy the file into the folder"
    )


def _solo_ids(folder: Path, vocabulary: int) -> dict[str, int]:
    """Ids of the tokens in and around a picture. Raises `CheckpointError` where nothing says them."""
    place = find_tokenizer(folder)
    if place is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(place)
        known = tokenizer.get_vocab()
        missing = [name for name in _SOLO_IDS if name not in known]
        if missing:
            raise CheckpointError(
                f"{folder}: its tokenizer has no {missing[0]}; copy the checkpoint's own into the folder"
            )
        return {name: known[name] for name in _SOLO_IDS}
    if vocabulary != _SOLO_VOCABULARY:
        raise CheckpointError(
            f"{folder}: which ids stand for a picture is not known: it has no tokenizer, and {vocabulary} rows where the published "
            f"checkpoint has {_SOLO_VOCABULARY}; copy its tokenizer into the folder"
        )
    return dict(_SOLO_IDS)


def _shape(tensors: Mapping[str, Tensor], name: str, folder: Path) -> tuple[int, ...]:
    """Raises `CheckpointError` for a weight that is absent."""
    if name not in tensors:
        raise CheckpointError(
            f"{folder}: {name} of its patch embedding is missing; a shard may be absent: copy it again"
        )
    return tuple(tensors[name].shape)
