"""Whose features do the semantic codes learn?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.damage import read_safetensors
from mllm.errors import CheckpointError, ConfigError, DataError
from mllm.modes import by_umask
from mllm.types import Grid
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.encoder import FeatureEncoder, encoder_settings, resize_tokens
from mllm.visual_tokenizers.images import ImageSource, to_pixels
from mllm.visual_tokenizers.perceptual import read_weights
from mllm.visual_tokenizers.recipe import SemanticSpec, SupervisedTeacherSpec, TeacherSpec

TEACHER_FILE = "teacher.safetensors"


class Teacher(nn.Module):
    """Frozen network: pixels in [-1, 1] → ``tokens`` ``(B, N, T)`` on ``grid`` and ``pooled`` ``(B, T)``."""

    grid: Grid
    width: int

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class EncoderTeacher(Teacher):
    """Any vision encoder; its pooled feature is the tokens' mean."""

    def __init__(self, settings: Any, projection: str | None = None):
        super().__init__()
        self.encoder = FeatureEncoder(encoder_settings(settings))
        self.grid, self.width = tuple(self.encoder.grid), self.encoder.width
        self.register_buffer("projection", None)
        if projection is not None:
            matrices = [value for value in read_weights(projection, "teacher.projection").values() if value.dim() == 2]
            if len(matrices) != 1 or matrices[0].shape[1] != self.width:
                raise CheckpointError(
                    f"{projection}: expected one matrix (T, {self.width}), as in a linear layer's weight"
                )
            self.projection = matrices[0].float()
            self.width = len(matrices[0])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(pixels)
        if self.projection is not None:
            tokens = F.linear(tokens, self.projection)
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class InitialTeacher(Teacher):
    """A copy of DualToken's vision model before training: its semantic layer's output and its pooled feature."""

    embeddings: Any
    layers: Any
    post_norm: Any
    head: Any

    def __init__(self, tokenizer: VisualTokenizer):
        super().__init__()
        if not hasattr(tokenizer, "embeddings"):
            raise ConfigError(f"teacher.initial: {tokenizer.name} has no vision model of its own; give teacher.encoder")
        for name in ("embeddings", "layers", "post_norm", "head"):
            setattr(self, name, copy.deepcopy(getattr(tokenizer, name)))
        vision: Any = tokenizer
        self.layer: int = vision.config.layer_semantic
        self.grid, self.width = vision.grid, int(vision.width)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = tokens = self.embeddings(pixels)
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
            if number == self.layer:
                tokens = x
        return {"tokens": tokens, "pooled": self.head(self.post_norm(x))}


def build_teacher(
    spec: TeacherSpec, tokenizer: VisualTokenizer, images: ImageSource, *, seed: int, directory: Path | None
) -> Teacher:
    """The teacher of a recipe, frozen, with its weights. A supervised one is trained here on the images' labels,
    once: its weights are kept in ``directory`` and read from there next time."""
    if spec.initial:
        teacher: Teacher = InitialTeacher(tokenizer)
    elif spec.encoder is not None:
        teacher = EncoderTeacher(spec.encoder, spec.projection)
        teacher.encoder.load_pretrained()
    else:
        assert spec.supervised is not None
        teacher = _supervised(spec.supervised, images, seed, directory)
    return teacher.requires_grad_(False).eval()


def _supervised(spec: SupervisedTeacherSpec, images: ImageSource, seed: int, directory: Path | None) -> Teacher:
    from safetensors.torch import save_file

    settings = {
        "type": "small_vit",
        "image_size": images.size,
        **spec.model_dump(include={"width", "depth", "heads", "patch_size"}),
    }
    teacher = EncoderTeacher(settings)
    file = None if directory is None else directory / TEACHER_FILE
    if file is not None and file.is_file():
        teacher.load_state_dict(read_safetensors(file))
        return teacher
    train_classifier(teacher, images, spec, seed=seed)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in teacher.state_dict().items()}, str(file))
        by_umask(file)
    return teacher


def train_classifier(teacher: Teacher, images: ImageSource, spec: SupervisedTeacherSpec, *, seed: int) -> nn.Linear:
    """Train ``teacher`` and a linear layer on its pooled feature to tell the classes, on the teacher's
    device; returns the layer."""
    if images.labels is None:
        raise DataError("teacher.supervised: these images have no classes; give teacher.encoder instead")
    device = next(teacher.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(teacher.width, len(images.classes)).to(device)
        optimizer = torch.optim.AdamW([*teacher.parameters(), *layer.parameters()], lr=spec.lr, weight_decay=0.01)
        generator = torch.Generator().manual_seed(seed)
        for step in range(spec.steps):
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * min(1.0, (step + 1) / 20) * (1 - step / spec.steps)
            picks = torch.randint(len(images), (spec.batch_size,), generator=generator)
            logits = layer(teacher(to_pixels(images.batch(picks.tolist()), device))["pooled"])
            loss = F.cross_entropy(logits, images.labels[picks].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer


def semantic_loss(
    spec: SemanticSpec, features: dict[str, Tensor], taught: dict[str, Tensor], grids: tuple[Grid, Grid]
) -> dict[str, Tensor]:
    """Named losses between the tokenizer's features and the teacher's; grids: (tokenizer's, teacher's), where the
    teacher's tokens are resized to the tokenizer's."""
    losses = {}
    for key, weight in (("tokens", spec.tokens), ("pooled", spec.pooled)):
        if weight == 0:
            continue
        if key not in features:
            raise ConfigError(
                f"losses.semantic.{key}: this tokenizer says no {key!r} feature; it has {sorted(features)}"
            )
        mine, target = features[key].float(), taught[key].detach().float()
        if key == "tokens":
            target = resize_tokens(target, grids[1], grids[0])
        if mine.shape != target.shape:
            raise ConfigError(
                f"losses.semantic: the codes say {tuple(mine.shape)} but the teacher {tuple(target.shape)}; "
                "set the tokenizer's teacher_dim to the teacher's width"
            )
        cosine = F.cosine_similarity(mine, target, dim=-1).mean()
        loss = 1 - cosine if spec.kind == "cosine" else F.mse_loss(mine, target) - cosine
        losses[f"semantic/{key}"] = spec.weight * weight * loss
    return losses
