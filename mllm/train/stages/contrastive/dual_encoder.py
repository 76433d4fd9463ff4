"""Which whole CLIP-style model does an encoder of ours belong to, and how do weights pass between the two?"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.damage import naming_damage
from mllm.encoders.base import VisionEncoder
from mllm.encoders.library import LibraryEncoder
from mllm.encoders.weights import shorten
from mllm.errors import CheckpointError, ConfigError, MllmError, UnavailableError
from mllm.noise import load_report_unless_told
from mllm.processing.protocol import TextTokenizer
from mllm.train.engine.trainable import StageConfig, StageModel
from mllm.train.stages.contrastive.losses import contrastive_loss, ranking_loss
from mllm.train.stages.contrastive.words_dual import WordsDual

if TYPE_CHECKING:
    from open_clip import CLIP, SimpleTokenizer
    from transformers import PreTrainedModel

TEXT_PART = "text_encoder"
_LARGEST_SCALE = math.log(100)
_SAY_NOTHING = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")
"""Entries of a CLIP-style checkpoint that are no weights of its text side."""


class HfDual(nn.Module):
    """CLIP, SigLIP, SigLIP2, MetaCLIP … of transformers: any model with ``get_image_features`` and ``get_text_features``."""

    image_prefixes = ("vision_model.", "visual_projection.")
    model: Any

    def __init__(self, model: PreTrainedModel, tokenizer: TextTokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.fixed_length = str(model.config.model_type).startswith(
            "siglip"
        )  # trained on texts padded to the full length
        self.max_length = int(model.config.text_config.max_position_embeddings)

    @property
    def embed_dim(self) -> int:
        return int(self.model.config.text_config.hidden_size)

    def tokenize(self, text: str, length: int) -> tuple[list[int], bool]:
        """(ids of at most ``length`` tokens, whether the text was cut)."""
        ids, end = self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):  # CLIP reads the text where it ends
            ids = [*ids, end]
        return (ids, False) if len(ids) <= length else ([*ids[: length - 1], ids[-1]], True)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def encode_images(self, pixels: Tensor) -> Tensor:
        output = self.model.get_image_features(pixel_values=pixels)
        return getattr(output, "pooler_output", output)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        output = self.model.get_text_features(input_ids=ids, attention_mask=None if self.fixed_length else mask)
        return getattr(output, "pooler_output", output)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class OpenClipDual(nn.Module):
    """A whole open_clip model."""

    image_prefixes = ("visual.",)
    fixed_length = True

    def __init__(self, model: CLIP, tokenizer: SimpleTokenizer, architecture: Any):
        super().__init__()
        self.model, self.tokenizer, self.architecture = model, tokenizer, architecture
        self.max_length = int(getattr(tokenizer, "context_length", 77))
        self.pad_id = int(getattr(tokenizer, "pad_token_id", None) or 0)

    def tokenize(self, text: str, length: int) -> tuple[list[int], bool]:
        ids = self.tokenizer([text])[0].tolist()
        return ids[:length], len(ids) > length or (ids[-1] != 0 and len(self.tokenizer.encode(text)) + 2 > len(ids))

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.encode_text(ids)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_model

        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "open_clip_model.safetensors"))
        bias = self.model.logit_bias  # open_clip makes no place for one that its config does not name
        given = self.architecture if bias is None else {**self.architecture, "init_logit_bias": float(bias)}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": given}), encoding="utf-8")


def build_dual(encoder: VisionEncoder, options: Any, *, where: str) -> HfDual | OpenClipDual | WordsDual:
    """The whole model that ``encoder`` is the image side of, starting from the encoder's present weights; with ``options.words``, the
    encoder itself beside a text side of its own.

    Raises `ConfigError` for encoders that have no text side, `UnavailableError` when the published weights are not here.
    """
    if options.words is not None:
        return WordsDual(encoder, options.words, where=where)
    from mllm.encoders.hf import HfEncoder
    from mllm.encoders.open_clip import OpenClipEncoder

    if not isinstance(encoder, HfEncoder | OpenClipEncoder):
        raise ConfigError(
            f"{where}: an encoder of type {encoder.config.type!r} has no text side to be compared with, as type hf (CLIP, SigLIP) "
            "and open_clip have; set words to a language model (package:smollm2-135m-instruct, a folder, a hub id), and it gets one"
        )
    make = _hf_dual if isinstance(encoder, HfEncoder) else _open_clip_dual
    dual = make(encoder, options, where)
    pass_weights(encoder, dual, to_encoder=False)
    return dual


def _hf_dual(encoder: Any, options: Any, where: str) -> HfDual:
    from transformers import AutoTokenizer

    weights = encoder.config.weights
    source = options.source or (weights.source if weights is not None else None)
    revision = options.revision if options.source else (weights.revision if weights is not None else None)
    if source is None and options.config is None:
        raise ConfigError(
            f"{where}: the encoder names no published weights; give source (a CLIP or SigLIP model's hub id or folder), or config "
            "(an HF config with text_config and vision_config, from scratch)"
        )
    tokenizer_source: Any = options.tokenizer or source
    if tokenizer_source is None:
        raise ConfigError(f"{where}.tokenizer: a text encoder from scratch needs a tokenizer (hub id or local path)")
    try:
        with naming_damage(source, tokenizer_source):
            model, config = _hf_model(encoder, options, where, source, revision)
            tokenizer = AutoTokenizer.from_pretrained(
                tokenizer_source, revision=None if options.tokenizer else revision
            )
    except (OSError, ValueError) as error:
        if isinstance(error, MllmError):
            raise
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UnavailableError(
            f"{where}: the dual encoder {source or options.config} cannot be read ({first}); give a local path"
        ) from error
    if not hasattr(model, "get_image_features"):
        raise ConfigError(f"{where}: {config.model_type} embeds no images and texts in one space")
    return HfDual(model, tokenizer)


@load_report_unless_told()
def _hf_model(encoder: Any, options: Any, where: str, source: str | None, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel

    config = (
        AutoConfig.for_model(**options.config)
        if options.config
        else AutoConfig.from_pretrained(str(source), revision=revision)
    )
    if not hasattr(config, "text_config") or not hasattr(config, "vision_config"):
        raise ConfigError(
            f"{where}: {source or config.model_type} has no text side; name the whole CLIP-style model in source"
        )
    config.vision_config.image_size = encoder.config.info.image.height
    if options.config:
        return AutoModel.from_config(config), config
    model, report = AutoModel.from_pretrained(  # the position table is the encoder's own, already at its image size
        str(source),
        revision=revision,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    other = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in report["mismatched_keys"]]
    other = [key for key in other if not (key.startswith("vision_model.") and "position" in key)]
    absent = [key for key in report["missing_keys"] if key not in ("logit_scale", "logit_bias")]
    if absent or other:
        raise CheckpointError(
            f"{where}: {source} is not the whole model: {len(absent)} weights are missing and {len(other)} have another shape, which "
            f"would start at random ({shorten(sorted([*absent, *other]), 5)}). Name the whole CLIP-style model in source"
        )
    _refuse_left_over([key for key in report["unexpected_keys"] if key.startswith("text_model.")], source, where)
    return model, config


def _open_clip_dual(encoder: Any, options: Any, where: str) -> OpenClipDual:
    open_clip: Any = importlib.import_module("open_clip")

    from mllm.encoders.open_clip import read_architecture

    settings, weights = encoder.config, encoder.config.weights
    source = options.source or (weights.source if weights is not None else None)
    architecture = options.config or settings.architecture
    described = read_architecture(architecture)[0] if isinstance(architecture, str) else architecture
    if "text_cfg" not in described:
        raise ConfigError(
            f"{where}: the encoder's architecture has no text_cfg; give config with embed_dim, vision_cfg and text_cfg"
        )
    image = settings.info.image
    vision = {**described["vision_cfg"], "image_size": image.height, "patch_dropout": 0.0}
    starts = {key: described[key] for key in ("init_logit_scale", "init_logit_bias") if key in described}
    model = open_clip.CLIP(
        described["embed_dim"], vision, described["text_cfg"], quick_gelu=bool(settings.quick_gelu), **starts
    )
    if source is not None:
        try:
            if isinstance(architecture, str) and not Path(source).exists():
                full = open_clip.create_model(architecture, pretrained=source, precision="fp32")
                state = full.state_dict()
            else:
                with naming_damage(source):
                    state = importlib.import_module("open_clip.factory").load_state_dict(source)
        except MllmError:
            raise
        except Exception as error:  # download clients raise many kinds
            raise UnavailableError(f"{where}: weights {source} of {architecture} cannot be read ({error})") from error
        if "logit_bias" in state and model.logit_bias is None:  # trained by the sigmoid loss, which goes on from it
            model.logit_bias = nn.Parameter(torch.zeros(()))
        own = model.state_dict()
        flat = {k: state[k].reshape(own[k].shape) for k in ("logit_scale", "logit_bias") if k in state and k in own}
        state = {**state, **flat}  # one number, which some files keep as a list of one
        fitting = {k: v for k, v in state.items() if k in own and (v.shape == own[k].shape)}
        ours = encoder.model.state_dict()
        passed = {k for k in own if k.startswith("visual.") and any(k.endswith(f".{key}") for key in ours)}
        absent = [k for k in own if k not in fitting and k not in passed and k != "logit_bias"]
        if absent:
            raise CheckpointError(
                f"{where}: {source} is not the whole model: {len(absent)} weights are missing or have another shape, which would start "
                f"at random ({shorten(absent, 5)})"
            )
        _refuse_left_over([k for k in state if k not in own and not k.startswith("visual.")], source, where)
        model.load_state_dict(fitting, strict=False)
    name = architecture if isinstance(architecture, str) else None
    tokenizer = (
        open_clip.get_tokenizer(name) if name else open_clip.SimpleTokenizer(context_length=model.context_length)
    )
    return OpenClipDual(model, tokenizer, described)


def _refuse_left_over(names: list[str], source: Any, where: str) -> None:
    """A text side with more than the architecture has is another one; it would be cut. The image side is the encoder's."""
    more = [name for name in names if name.rpartition(".")[2] not in _SAY_NOTHING]
    if more:
        raise CheckpointError(
            f"{where}: {source} has {len(more)} weights that the text side lacks, which would be left out ({shorten(sorted(more), 5)}). "
            "Give the config that the weights were trained with"
        )


def pass_weights(encoder: LibraryEncoder, dual: Any, *, to_encoder: bool) -> int:
    """Copy every tensor that the encoder (cut at its feature layer) and the dual model's image side share; returns how many.

    Raises `CheckpointError` when one of the encoder's has no counterpart of the same shape.
    """
    ours, whole = encoder.model.state_dict(), dual.model.state_dict()
    root = dual.image_prefixes[0]
    candidates = [k for k in whole if k.startswith(root)]
    with torch.no_grad():
        for key, tensor in ours.items():
            found = [k for k in candidates if k == root + key or k.endswith("." + key)]
            exact = [k for k in found if k == root + key] or found
            if len(exact) != 1 or whole[exact[0]].shape != tensor.shape:
                shown = f"{tuple(tensor.shape)} here, {[tuple(whole[k].shape) for k in exact]} there"
                raise CheckpointError(
                    f"the dual encoder's image side is of another architecture than the encoder: {key} ({shown}); "
                    "options.source or options.config must be the model that the encoder is the image side of"
                )
            target, source = (tensor, whole[exact[0]]) if to_encoder else (whole[exact[0]], tensor)
            target.copy_(source)
    return len(ours)


class ContrastiveModel(StageModel):
    """A dual encoder as the trainer wants a model: parts by name, a loss for a batch."""

    def __init__(self, name: str, dual: Any, options: Any, *, pixel_key: str):
        super().__init__()
        self.encoder_name, self.options, self.pixel_key = name, options, pixel_key
        self.dual = dual
        self.config = StageConfig("dual")
        inner = dual.model
        if getattr(inner, "logit_scale", None) is None:
            inner.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if options.loss == "sigmoid" and getattr(inner, "logit_bias", None) is None:
            inner.logit_bias = nn.Parameter(torch.tensor(-10.0))
        elif options.loss != "sigmoid" and getattr(inner, "logit_bias", None) is not None:
            inner.logit_bias.requires_grad_(False)

    def part_prefixes(self) -> dict[str, list[str]]:
        image = [f"dual.model.{p}" for p in self.dual.image_prefixes]
        return {f"encoders.{self.encoder_name}": [*image, "dual.model.logit_"], TEXT_PART: ["dual.model."]}

    def named_parts(self) -> dict[str, list[tuple[str, nn.Module]]]:
        image = [p.rstrip(".") for p in self.dual.image_prefixes if hasattr(self.dual.model, p.rstrip("."))]
        rest = [n for n, _ in self.dual.model.named_children() if n not in image]
        modules = {f"encoders.{self.encoder_name}": image, TEXT_PART: rest}
        return {
            part: [(f"dual.model.{n}", self.dual.model.get_submodule(n)) for n in names]
            for part, names in modules.items()
        }

    def part_of(self, parameter_name: str) -> str:
        for part, prefixes in self.part_prefixes().items():
            if any(parameter_name.startswith(prefix) for prefix in prefixes):
                return part
        raise KeyError(parameter_name)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        if hasattr(self.dual.model, "gradient_checkpointing_enable"):
            self.dual.model.gradient_checkpointing_enable(**options)
        else:
            self.dual.model.set_grad_checkpointing(True)

    def forward(self, num_items_in_batch: float, **inputs: Any) -> Any:
        """``loss``: the sum over these pairs divided by ``num_items_in_batch``, all pairs of the optimizer step."""
        ids = inputs["text_ids"]  # (B, 1 + K, T), -1 after a text's end; an absent negative is -1 throughout
        count, texts, _ = ids.shape
        present = ids[..., 0] >= 0
        if not self.dual.fixed_length:
            ids = ids[..., : int((ids >= 0).sum(-1).max())]
        mask = ids >= 0
        mask[..., 0] = True  # an absent negative is one padding token, whose similarity is hidden
        ids = ids.clamp_min(0).where(ids >= 0, torch.full_like(ids, self.dual.pad_id))
        images = F.normalize(self.dual.encode_images(inputs[self.pixel_key]).float(), dim=-1)
        embedded = self.dual.encode_texts(ids.flatten(0, 1), mask.flatten(0, 1).long()).float()
        embedded = F.normalize(embedded, dim=-1).view(count, texts, -1)
        scale, bias = self.scale(), getattr(self.dual.model, "logit_bias", None)
        bias = None if bias is None else bias.float()
        loss = contrastive_loss(
            images, embedded, scale, bias=bias, present=present if texts > 1 else None, kind=self.options.loss
        )
        if self.options.ranking_weight:
            teacher = inputs["teacher_scores"].float()
            loss = loss + self.options.ranking_weight * ranking_loss(
                images, embedded, scale, teacher, floor=self.options.ranking_floor
            )
        return SimpleNamespace(loss=loss / num_items_in_batch)

    def scale(self) -> Tensor:
        """The factor on similarities: between 1 and 100 whatever the parameter says, as CLIP clamps it after each step; the
        gradient passes, so that it can come back."""
        logarithm = self.dual.model.logit_scale.float().reshape(())
        return (logarithm + (logarithm.clamp(0.0, _LARGEST_SCALE) - logarithm).detach()).exp()
