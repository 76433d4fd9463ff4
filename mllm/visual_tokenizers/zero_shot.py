"""How many pictures do the semantic codes name without training, through the text side of their teacher?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.errors import ConfigError, DataError
from mllm.types import Grid, ImageSpec
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.encoder import encoder_settings, resize_tokens
from mllm.visual_tokenizers.images import ImageSource, to_pixels
from mllm.visual_tokenizers.joint import NO_CLASS_TOKEN, TEMPLATE, JointModel
from mllm.visual_tokenizers.recipe import TokenizerTraining

_STATISTICS_IMAGES = 256


@dataclass(frozen=True)
class Tap:
    """Where in the teacher the semantic features are taken.

    sizes: the vision side's model type, width, number of blocks and patch size; layer: blocks that come before; normed:
    the last norm has been applied; image and grid: what the teacher sees and how its tokens lie. says: the feature to go
    by, patch ``tokens`` or the teacher's own ``pooled`` one. lost: what training leaves open of a token, its length (a
    cosine loss) or its mean and spread (layer-normalised targets).
    """

    sizes: tuple[str, int, int, Any]
    layer: int
    normed: bool
    image: ImageSpec
    grid: Grid
    says: Literal["tokens", "pooled"] = "tokens"
    lost: Literal["nothing", "length", "spread"] = "nothing"


def teacher_tap(recipe: TokenizerTraining, tokenizer: VisualTokenizer) -> Tap:
    """Where the tokenizer's semantic features lie in its teacher. Raises `ConfigError` for a teacher that has no text side
    or whose own head cannot read them."""
    own = getattr(tokenizer, "semantic_encoder", None)
    spec = recipe.teacher
    if own is None and spec is not None and spec.initial:
        return _initial_tap(tokenizer)
    if own is not None:
        settings, where = getattr(tokenizer.config, "semantic_encoder"), "tokenizer.semantic_encoder"  # noqa: B009
    elif spec is not None and spec.encoder is not None:
        settings, where = encoder_settings(spec.encoder), "teacher.encoder"
    else:
        reason = "has no teacher" if spec is None else "has a teacher trained on its own classes"
        raise ConfigError(f"zero-shot: recipe {recipe.name} {reason}; only a CLIP or SigLIP teacher has a text side")
    if settings["type"] != "hf":
        raise ConfigError(
            f"zero-shot: {where} is a {settings['type']}; only CLIP and SigLIP of type hf have a text side"
        )
    from mllm.encoders import ENCODERS
    from mllm.encoders.catalogue import encoder_config
    from mllm.encoders.hf_models import num_blocks, vision_config
    from mllm.encoders.library import take_layers

    config: Any = encoder_config(settings, where=where)
    info = ENCODERS.get("hf").describe(config)
    vision = vision_config(config.architecture)
    depth = num_blocks(config.architecture)
    says: Literal["tokens", "pooled"] = (
        "pooled" if own is not None and hasattr(tokenizer, "semantic_features") else "tokens"
    )
    if vision.model_type == "clip_vision_model" and says == "tokens":
        raise ConfigError(f"zero-shot: {where}: {NO_CLASS_TOKEN}")
    if own is None and spec is not None and spec.projection is not None:
        raise ConfigError(
            "zero-shot: teacher.projection mixes the channels of the tokens, so the teacher's own head cannot read them; "
            "a zero-shot score needs a teacher without projection"
        )
    if own is None and recipe.losses.semantic is not None and recipe.losses.semantic.tokens == 0:
        raise ConfigError("zero-shot: losses.semantic.tokens is 0, so the codes were not taught the teacher's tokens")
    counts = take_layers(config.layers, depth)
    if len(counts) != 1 or counts[0] == 0:
        raise ConfigError(f"zero-shot: {where}.layers {config.layers}: needs the output of one block")
    normed = counts[0] == depth and config.final_norm
    cosine = recipe.losses.semantic is not None and recipe.losses.semantic.kind == "cosine"
    return Tap(
        (vision.model_type, info.width, depth, getattr(vision, "patch_size", None)),
        counts[0],
        normed,
        info.image,
        (info.grid[0], info.grid[1]),
        says=says,
        lost="spread" if own is not None else "length" if cosine else "nothing",
    )


def _initial_tap(tokenizer: VisualTokenizer) -> Tap:
    """DualToken: the pooled feature comes from its own later layers and head."""
    config: Any = tokenizer.config
    vision = {"num_hidden_layers": 12, "patch_size": 16, **config.vision}
    width: int = tokenizer.width  # type: ignore[assignment]
    sizes = ("siglip_vision_model", width, vision["num_hidden_layers"], vision["patch_size"])
    return Tap(sizes, config.layer_semantic, False, tokenizer.image, tokenizer.grid, says="pooled")


def _check_sizes(joint: JointModel, tap: Tap) -> None:
    theirs = (joint.model.config.vision_config.model_type, joint.width, joint.depth, joint.patch_size)
    if tap.sizes != theirs:
        shown = "{} of width {}, {} layers, patches of {}".format
        raise ConfigError(
            f"zero-shot: the teacher is a {shown(*tap.sizes)}, the vision side of {joint.name} a {shown(*theirs)}; "
            "name the model whose vision side is the teacher"
        )


def zero_shot_head(joint: JointModel, tap: Tap) -> Callable[[Tensor], Tensor]:
    """What reads the feature that ``tap.says``: tokens ``(B, N, T)`` or pooled ``(B, T)`` → ``(B, J)``, in the space of
    the model's texts.

    SigLIP tokens go through the teacher's blocks after the tap, its last norm unless they have had it, and its attention
    pooling. A pooled feature is SigLIP's embedding already, and CLIP's after its visual projection. CLIP's patch tokens
    raise `ConfigError`: the class token is not their mean, nor can it be made from them.
    """
    if tap.says == "pooled":
        return joint.project
    if joint.family == "clip":
        joint.finish(torch.empty(0), tap.layer)  # says why not
    return lambda tokens: joint.finish(tokens, tap.layer, normed=tap.normed)


def semantic_features(tokenizer: VisualTokenizer, pixels: Tensor) -> dict[str, Tensor]:
    """What the codes of images say to a teacher, ``tokens`` ``(B, N, T)`` and perhaps ``pooled`` ``(B, T)``. Raises
    `ConfigError` for a tokenizer without a semantic part."""
    if hasattr(tokenizer, "semantic_features"):
        features = tokenizer.semantic_features(tokenizer.encode(pixels))  # type: ignore[operator]
    elif hasattr(tokenizer, "semantic_tokens"):
        features = {"tokens": tokenizer.semantic_tokens(tokenizer.encode(pixels))}  # type: ignore[operator]
    else:
        features = tokenizer(pixels).features
    if not features:
        raise ConfigError(f"zero-shot: this {tokenizer.name} tokenizer has no semantic part; its codes are of pixels")
    return {name: value.float() for name, value in features.items()}


class TokenRestorer:
    """Gives tokens what training leaves open: the teacher's own mean at each position, over training images.

    A cosine loss fixes a token's direction alone; layer-normalised targets lose its mean and spread. Layers inside the
    teacher add to a token, so they need it at its right size.
    """

    def __init__(self, joint: JointModel, tap: Tap, images: ImageSource, *, batch_size: int = 32):
        self.lost, self.sums, number = tap.lost, None, min(len(images), _STATISTICS_IMAGES)
        if self.lost == "nothing":
            return
        picks = [i * len(images) // number for i in range(number)]  # from everywhere: sources lie in order of class
        for start in range(0, number, batch_size):
            pixels = to_pixels(images.batch(picks[start : start + batch_size]), joint.device)
            tokens = _taught(joint, tap, pixels)[1]
            values = torch.stack([tokens.norm(dim=-1), tokens.mean(-1), tokens.std(-1, correction=0)]).sum(1)
            self.sums = values if self.sums is None else self.sums + values
        assert self.sums is not None
        self.length, self.mean, self.std = (self.sums / number)[..., None]

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.lost == "length":
            return F.normalize(tokens, dim=-1) * self.length
        if self.lost == "spread":
            return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * self.std + self.mean
        return tokens


def _taught(joint: JointModel, tap: Tap, pixels: Tensor) -> tuple[Tensor, Tensor]:
    whole, tokens = joint.embed_images(pixels, tap.image, tap.layer)
    return whole, joint.vision.post_layernorm(tokens) if tap.normed else tokens


@torch.no_grad()
def zero_shot(
    tokenizer: VisualTokenizer,
    joint: JointModel,
    recipe: TokenizerTraining,
    train: ImageSource,
    images: ImageSource,
    *,
    templates: Sequence[str] = (TEMPLATE,),
    batch_size: int = 32,
    limit: int | None = None,
) -> dict[str, Any]:
    """How many of ``images`` are nearest to the text of their class, by what their codes say (``correct``) and by the
    teacher's own features (``teacher_correct``, the ceiling), of ``n`` images in ``classes`` classes.

    cosine: of what the codes say and the teacher's feature, mean; near 0 the model is not the teacher. train: where
    token sizes that training leaves open are taken from. Raises `DataError` for images without classes.
    """
    if images.labels is None:
        raise DataError("zero-shot: these images have no classes; a folder has one in each sub-folder")
    tap = teacher_tap(recipe, tokenizer)
    _check_sizes(joint, tap)
    head = zero_shot_head(joint, tap)
    device = tokenizer.last_layer().device
    joint.to(device)
    texts = joint.embed_classes(images.classes, templates)
    restore = TokenRestorer(joint, tap, train, batch_size=batch_size) if tap.says == "tokens" else None
    number = len(images) if limit is None else min(limit, len(images))
    correct = teacher_correct = 0
    cosine = 0.0
    for start in range(0, number, batch_size):
        rows = range(start, min(start + batch_size, number))
        pixels, labels = to_pixels(images.batch(rows), device), images.labels[rows.start : rows.stop].to(device)
        whole, tokens = _taught(joint, tap, pixels)
        features = semantic_features(tokenizer, pixels)
        if tap.says not in features:
            raise ConfigError(f"zero-shot: this tokenizer says no {tap.says!r} feature; it has {sorted(features)}")
        feature = features[tap.says]
        if feature.shape[-1] != joint.width:
            raise ConfigError(
                f"zero-shot: the codes' {tap.says} have {feature.shape[-1]} channels, the vision side of {joint.name} has "
                f"{joint.width}; name the model whose vision side is the teacher"
            )
        if restore is None:
            embedded = head(feature)
            alike = F.cosine_similarity(embedded, whole, dim=-1)
        else:
            feature = resize_tokens(feature, tokenizer.grids.get("semantic", tokenizer.grid), tap.grid)
            target = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) if tap.lost == "spread" else tokens
            alike = F.cosine_similarity(feature, target, dim=-1)
            embedded = head(restore(feature))
        cosine += float(alike.mean()) * len(rows)
        correct += int((joint.logits(embedded, texts).argmax(1) == labels).sum())
        teacher_correct += int((joint.logits(whole, texts).argmax(1) == labels).sum())
    return {
        "correct": correct,
        "teacher_correct": teacher_correct,
        "n": number,
        "classes": len(images.classes),
        "cosine": cosine / number,
    }
