"""What does a recipe say of a visual tokenizer's training: on which images, with which losses and teacher?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mllm import assets
from mllm.config import StrictModel, read_yaml, validate
from mllm.errors import ConfigError
from mllm.recipe import Recipe, StageSpec, load_recipe
from mllm.visual_tokenizers.diffusion.config import DiffusionDecoderConfig
from mllm.visual_tokenizers.networks.settings import DiscriminatorConfig


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

    renamed: ClassVar = {"rate": "lr"}

    weight: float = Field(default=0.5, gt=0)
    start: int = Field(default=20000, ge=0)
    """Step from which both the generator's loss and the discriminator's training are on."""
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    adaptive: tuple[float, float] | None = None
    """Bounds of the gradient-norm ratio that scales the weight (DualToken: ``[0.3, 10]``); None: fixed (TokenFlow)."""
    leak: float = Field(default=0.0, ge=0)
    """Slope of the hinge below zero (DualToken's code: 0.01)."""
    lr: float | None = Field(default=None, gt=0)
    """Default: the tokenizer's."""
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

    renamed: ClassVar = {"rate": "lr"}

    width: int = Field(default=64, ge=4)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    patch_size: int = Field(ge=1)
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=1e-3, gt=0)


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


class OutliersSpec(StrictModel):
    """Which pixels are not learned from, by the teacher's features (Asymmetric Dual 3DGS, arXiv 2506.03538): their gradients are masked,
    the losses' values are not."""

    kind: Literal["regions", "soft"] = "regions"
    """regions: squares with more hot pixels than the picture has, hot where both pixel and feature residual are above the picture's
    quantile. soft: every pixel by 1 less its feature residual, scaled to 0 to 1 in each picture."""
    quantile: float = Field(default=0.9, gt=0, lt=1)
    region: int = Field(default=16, ge=1)
    """Side of a square, in pixels."""
    start: int = Field(default=0, ge=0)
    """Step from which pixels are left out: at first everything is hard to reconstruct."""


class LossesSpec(StrictModel):
    """Weights of everything that is summed. Perceptual and adversarial losses are off unless given."""

    l1: float = Field(default=0.0, ge=0)
    l2: float = Field(default=1.0, ge=0)
    perceptual: PerceptualSpec | None = None
    adversarial: AdversarialSpec | None = None
    semantic: SemanticSpec | None = None
    outliers: OutliersSpec | None = None
    """Leave pixels out that a teacher finds nothing like the picture; needs ``teacher``."""
    quantizer: float = Field(default=1.0, ge=0)
    """Weight of the tokenizer's own losses (commitment, codebook, entropy …)."""
    weights: dict[str, float] = Field(default_factory=dict)
    """A single own loss by its name (``commitment/pixel``, ``semantic`` …) → weight in place of ``quantizer``."""


class TokenizerOptions(StrictModel):
    """``options`` of a tokenizer stage."""

    losses: LossesSpec = Field(default_factory=LossesSpec)
    teacher: TeacherSpec | None = None
    init: str | None = None
    """Folder of a saved tokenizer to start from; default: the stage before, else published weights of the parts."""
    init_skip: list[str] = Field(default_factory=list)
    """Weights whose names start with one of these are not taken from ``init`` (e.g. ``decoder.``)."""
    freeze: list[str] = Field(default_factory=list)
    """Of the parts that learn: never train parameters whose names start with one of these."""
    kmeans: int = Field(default=0, ge=0)
    """Put the codebooks on k-means centres of this many training images before the first step; 0: not."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between held-out scores; the last step always has them."""
    evaluate_images: int = Field(default=256, ge=1)
    """How many held-out images are scored on the way; at the end, all."""

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerOptions:
        if (self.teacher is None) != (self.losses.semantic is None):
            raise ValueError("teacher and losses.semantic go together: give both or neither")
        if self.losses.outliers is not None and self.teacher is None:
            raise ValueError("losses.outliers compares features: give a teacher (and losses.semantic) too")
        if self.losses.l1 == 0 and self.losses.l2 == 0:
            raise ValueError("losses.l1 and losses.l2 are both 0: nothing would be reconstructed")
        return self


class MaskSpec(StrictModel):
    """Editing: which parts of a training picture are hidden, so that the decoder learns to make them fit what is kept."""

    boxes: tuple[float, float] = (0.2, 0.8)
    """Smallest and largest side of a random box, as a share of the picture's."""
    empty: float = Field(default=0.1, ge=0, le=1)
    """Share of pictures of which all is kept."""
    full: float = Field(default=0.1, ge=0, le=1)
    """Share of pictures of which nothing is kept."""
    emphasis: bool = False
    """Errors where a picture is hidden count once more, by 1 less the hidden share: small parts weigh more (DualDiff's foreground loss)."""

    @model_validator(mode="after")
    def _shares(self) -> MaskSpec:
        if self.empty + self.full > 1:
            raise ValueError("empty and full together are more than all pictures")
        if not 0 < self.boxes[0] <= self.boxes[1] <= 1:
            raise ValueError("boxes is [smallest, largest] share of the side, both in (0, 1]")
        return self


class DiffusionOptions(StrictModel):
    """``options`` of a diffusion stage."""

    decoder: DiffusionDecoderConfig
    """The decoder that learns."""
    masks: MaskSpec | None = None
    """Of a decoder with the condition ``source``."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between held-out scores of sampled pictures; the last step always has them."""
    evaluate_images: int = Field(default=64, ge=1)
    """How many held-out pictures are sampled for these scores: the first ones."""

    @model_validator(mode="after")
    def _masked(self) -> DiffusionOptions:
        if ("source" in self.decoder.conditions) != (self.masks is not None):
            raise ValueError("masks and the decoder's condition source go together: give both or neither")
        return self


@dataclass(frozen=True)
class DiffusionTraining:
    """One diffusion stage of a recipe, taken apart. weights: folder of the saved tokenizer, None where a stage before makes it."""

    recipe: Recipe
    stage: StageSpec
    tokenizer: dict[str, Any]
    weights: str | None
    images: ImagesSpec
    options: DiffusionOptions


@dataclass(frozen=True)
class TokenizerTraining:
    """One tokenizer stage of a recipe, taken apart. tokenizer: the config that is trained."""

    recipe: Recipe
    stage: StageSpec
    tokenizer: dict[str, Any]
    images: ImagesSpec
    options: TokenizerOptions

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def teacher(self) -> TeacherSpec | None:
        return self.options.teacher

    @property
    def losses(self) -> LossesSpec:
        return self.options.losses


def tokenizer_training(recipe: Recipe, stage: StageSpec | None = None) -> TokenizerTraining:
    """What a tokenizer stage (default: the recipe's last) says. Raises `ConfigError` with the path to the key, also for a
    recipe that trains no tokenizer."""
    from mllm.visual_tokenizers.base import tokenizer_config

    stage = stage or next((s for s in reversed(recipe.stages) if s.kind == "tokenizer"), recipe.stages[-1])
    if stage.kind != "tokenizer" or recipe.model.visual_tokenizer is None:
        raise ConfigError(f"recipe {recipe.name} trains no visual tokenizer; those that do: mllm tokenizer ls")
    where = f"stages.{stage.name}"
    options = validate(TokenizerOptions, stage.options, where=f"{where}.options")
    tokenizer_config(recipe.model.visual_tokenizer, where="model.visual_tokenizer")
    return TokenizerTraining(recipe, stage, recipe.model.visual_tokenizer, stage_images(stage), options)


def diffusion_training(recipe: Recipe, stage: StageSpec) -> DiffusionTraining:
    """What a diffusion stage says. Raises `ConfigError` with the path to the key, also where no trained tokenizer comes before, and
    `CheckpointError` for a folder that holds none."""
    from mllm.visual_tokenizers.base import stored_config, tokenizer_config

    where, settings = f"stages.{stage.name}", dict(recipe.model.visual_tokenizer or {})
    options = validate(DiffusionOptions, stage.options, where=f"{where}.options")
    # A mapping is the tokenizer's own key (DualToken's published vision model), a text the folder of a trained tokenizer.
    weights = settings.pop("weights") if isinstance(settings.get("weights"), str) else None
    first = stage.name == recipe.stages[0].name
    if weights is None and first:
        raise ConfigError(
            f"{where}: a diffusion decoder learns beside a trained visual tokenizer; put a stage of kind tokenizer before it, or name "
            "a saved one, model.visual_tokenizer: {weights: FOLDER}"
        )
    if "type" not in settings and weights is not None:
        settings = stored_config(weights)
    tokenizer_config(settings, where="model.visual_tokenizer")
    return DiffusionTraining(recipe, stage, settings, weights if first else None, stage_images(stage), options)


def stage_images(stage: StageSpec) -> ImagesSpec:
    """Which pictures a stage of kind tokenizer or diffusion learns from. Raises `ConfigError`."""
    data = {"type": "folder", "options": {"path": stage.data}} if isinstance(stage.data, str) else stage.data
    return validate(ImagesSpec, data, where=f"stages.{stage.name}.data")


def load_images_spec(name: str | Path) -> ImagesSpec:
    """The pictures of a recipe's last stage of kind tokenizer or diffusion. Raises `ConfigError` for a recipe without one."""
    recipe = load_recipe(str(name))
    if recipe.model.language_model is not None:
        raise ConfigError(f"recipe {recipe.name} trains no visual tokenizer; those that do: mllm tokenizer ls")
    return stage_images(recipe.stages[-1])


def load_training(name: str | Path, overrides: list[str] | None = None) -> TokenizerTraining:
    """The last tokenizer stage of a recipe by name or path, with ``key.sub=value`` overrides."""
    return tokenizer_training(load_recipe(str(name), overrides))


def tokenizer_recipes() -> dict[str, Path]:
    """Name → file of every recipe that trains a visual tokenizer, or a diffusion decoder beside one."""
    found = {}
    for name, path in assets.iterate("recipes"):
        plain = read_yaml(path)
        stages = plain.get("stages") if isinstance(plain, dict) else None
        kinds = [s.get("kind") for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
        if {"tokenizer", "diffusion"} & set(kinds):
            found[name] = path
    return found
