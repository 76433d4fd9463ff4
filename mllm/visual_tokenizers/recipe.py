"""What is a tokenizer recipe: which visual tokenizer is trained, on which images, with which losses?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mllm import assets
from mllm.config import StrictModel, apply_overrides, read_yaml, validate
from mllm.errors import ConfigError
from mllm.recipe import HardwareSpec, OptimizerSpec, ScheduleSpec
from mllm.visual_tokenizers.networks.settings import DiscriminatorConfig

PREFIX = "tokenizer_"
"""Recipes in ``recipes/`` whose file name starts with this are tokenizer recipes."""


class ImagesSpec(StrictModel):
    """Where training and held-out images come from."""

    type: str = "folder"
    """A name of `IMAGE_SOURCES`: ``folder``, ``digits_and_charts``, or one that a plugin registers."""
    options: dict[str, Any] = Field(default_factory=dict)
    crop: tuple[float, float] | None = None
    """Training: random square crop of this share of the side, e.g. ``[0.8, 1.0]``."""
    flip: bool = False
    """Training: mirror half of the images. Never for text or digits."""

    @field_validator("crop")
    @classmethod
    def _crop(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1] <= 1:
            raise ValueError("crop is [smallest, largest] share of the side, both in (0, 1]")
        return value


class PerceptualSpec(StrictModel):
    """LPIPS (arXiv 1801.03924) on VGG-16; no weights are shipped or downloaded."""

    weight: float = Field(default=1.0, gt=0)
    vgg: str
    """File with torchvision's VGG-16 weights (``.pth`` or ``.safetensors``)."""
    linear: str | None = None
    """File with LPIPS's five learned channel weights (``lin0`` … ``lin4``); None: channels count equally."""


class AdversarialSpec(StrictModel):
    """A discriminator that joins in after ``start`` steps."""

    weight: float = Field(default=0.5, gt=0)
    start: int = Field(default=20000, ge=0)
    """Step from which both the generator's loss and the discriminator's training are on."""
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    adaptive: tuple[float, float] | None = None
    """Bounds of the gradient-norm ratio that scales the weight (DualToken: ``[0.3, 10]``); None: fixed (TokenFlow)."""
    leak: float = Field(default=0.0, ge=0)
    """Slope of the hinge below zero (DualToken's code: 0.01)."""
    rate: float | None = Field(default=None, gt=0)
    """Default: the tokenizer's rate."""
    betas: tuple[float, float] = (0.5, 0.9)


class SemanticSpec(StrictModel):
    """Distillation of a frozen teacher's features into what the codes say."""

    weight: float = Field(default=1.0, gt=0)
    kind: Literal["cosine", "mse_cosine"] = "cosine"
    """cosine: ``1 - cos`` per token, mean (TokenFlow). mse_cosine: ``MSE - cos`` (DualToken)."""
    tokens: float = Field(default=1.0, ge=0)
    pooled: float = Field(default=0.0, ge=0)
    """Weight of the pooled feature, where teacher and tokenizer have one."""


class SupervisedTeacherSpec(StrictModel):
    """A small vision transformer trained on the images' labels before the tokenizer."""

    width: int = Field(default=64, ge=4)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    patch_size: int = Field(ge=1)
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=64, ge=1)
    rate: float = Field(default=1e-3, gt=0)


class TeacherSpec(StrictModel):
    """The frozen network whose features the semantic codes learn. Exactly one."""

    encoder: str | dict[str, Any] | None = None
    """Any registered encoder's config or shipped entry; its published weights are loaded."""
    projection: str | None = None
    """File with one matrix ``(T, width)`` that the encoder's tokens are multiplied with (TokenFlow's CLIP teacher:
    the visual projection to 512 channels)."""
    supervised: SupervisedTeacherSpec | None = None
    initial: bool = False
    """The tokenizer's own vision model as it is before training (DualToken's teacher)."""

    @model_validator(mode="after")
    def _one(self) -> TeacherSpec:
        if (self.encoder is not None) + (self.supervised is not None) + self.initial != 1:
            raise ValueError("give exactly one of encoder, supervised and initial")
        if self.projection is not None and self.encoder is None:
            raise ValueError("projection goes with encoder")
        return self


class LossesSpec(StrictModel):
    """Weights of everything that is summed. Perceptual and adversarial losses are off unless given."""

    l1: float = Field(default=0.0, ge=0)
    l2: float = Field(default=1.0, ge=0)
    perceptual: PerceptualSpec | None = None
    adversarial: AdversarialSpec | None = None
    semantic: SemanticSpec | None = None
    quantizer: float = Field(default=1.0, ge=0)
    """Weight of the tokenizer's own losses (commitment, codebook, entropy …)."""
    weights: dict[str, float] = Field(default_factory=dict)
    """A single own loss by its name (``commitment/pixel``, ``semantic`` …) → weight in place of ``quantizer``."""


class TokenizerRecipe(StrictModel):
    """A whole tokenizer training run."""

    name: str
    description: str = ""
    source: str = ""
    plugins: list[str] = Field(default_factory=list)
    seed: int = 0
    output: str = ""
    """Output folder; default ``runs/<name>``."""
    hardware: HardwareSpec = Field(default_factory=HardwareSpec)
    tokenizer: dict[str, Any]
    init: str | None = None
    """Folder of a saved tokenizer to start from."""
    init_skip: list[str] = Field(default_factory=list)
    """Weights whose names start with one of these are not taken from ``init`` (e.g. ``decoder.``)."""
    only: list[str] = Field(default_factory=list)
    """Train only parameters whose names start with one of these; default: all."""
    freeze: list[str] = Field(default_factory=list)
    """Never train parameters whose names start with one of these."""
    images: ImagesSpec
    teacher: TeacherSpec | None = None
    losses: LossesSpec = Field(default_factory=LossesSpec)
    steps: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Images per process and step."""
    rate: float = Field(default=1e-4, gt=0)
    optimizer: OptimizerSpec = Field(default_factory=lambda: OptimizerSpec(betas=(0.9, 0.95)))
    schedule: ScheduleSpec = Field(default_factory=lambda: ScheduleSpec(type="constant", warmup=0.0))
    kmeans: int = Field(default=0, ge=0)
    """Put the codebooks on k-means centres of this many training images before the first step; 0: not."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the averaged weights that are evaluated and saved as final; 0: off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str | None = None
    """Default: a CUDA device per process where there is one, else the CPU."""
    log_every: int = Field(default=10, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    evaluate_images: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerRecipe:
        if (self.teacher is None) != (self.losses.semantic is None):
            raise ValueError("teacher and losses.semantic go together: give both or neither")
        if self.optimizer.type not in ("adamw", "sgd"):
            raise ValueError(f"optimizer.type {self.optimizer.type!r}: tokenizers train with adamw or sgd")
        if self.losses.l1 == 0 and self.losses.l2 == 0:
            raise ValueError("losses.l1 and losses.l2 are both 0: nothing would be reconstructed")
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")


def read_tokenizer_recipe(name: str | Path, overrides: list[str] | None = None) -> TokenizerRecipe:
    """What a recipe file says, its tokenizer's own settings not looked at yet (they need its class, and so torch)."""
    path = assets.find("recipes", str(name), kind="tokenizer recipe")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level")
    data.setdefault("name", path.stem)
    return validate(TokenizerRecipe, apply_overrides(data, overrides or []), where=path.name)


def load_tokenizer_recipe(name: str | Path, overrides: list[str] | None = None) -> TokenizerRecipe:
    """A tokenizer recipe by name or path, with ``key.sub=value`` overrides. Raises `ConfigError` with the path to
    the key."""
    from mllm.plugins import load_plugins
    from mllm.recipe import seen_from_here
    from mllm.visual_tokenizers.base import tokenizer_config

    recipe, path = read_tokenizer_recipe(name, overrides), assets.find("recipes", str(name), kind="tokenizer recipe")
    recipe.plugins = [seen_from_here(module, path.parent) for module in recipe.plugins]
    load_plugins(recipe.plugins)
    tokenizer_config(recipe.tokenizer, where=f"{path.name}.tokenizer")
    return recipe


def tokenizer_recipes() -> dict[str, Path]:
    """Name → file of every shipped tokenizer recipe."""
    return {name: path for name, path in assets.iterate("recipes") if name.startswith(PREFIX)}
