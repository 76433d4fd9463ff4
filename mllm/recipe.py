"""What is a recipe: which model is trained, in which stages, on which data?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from mllm import assets
from mllm.config import StrictModel, apply_overrides, read_yaml, validate
from mllm.errors import ConfigError
from mllm.former_recipes import CURE, upgraded
from mllm.plugins import load_plugins
from mllm.recipe_optimizer import OptimizerSpec, ScheduleSpec


class LanguageModelSpec(StrictModel):
    """Any Hugging Face causal language model."""

    source: str | None = None
    """Hub id, local folder or GGUF file (on disk, or ``owner/name/file.gguf``; its weights become plain ones); read by the
    first stage."""
    revision: str | None = None
    """Commit, tag or branch of ``source`` on the hub; a commit is what can be repeated."""
    licence: str = "unknown"
    """Licence of the weights, for the model card; SPDX name where there is one."""
    commercial: bool | None = None
    """May the weights be used commercially? None: not known."""
    config: dict[str, Any] | None = None
    """An architecture by its HF config (``model_type`` and sizes): with ``source``, makes the recipe readable offline;
    without it, a model from scratch."""
    tokenizer: str | None = None
    """Hub id or local path; default ``source``."""
    modality_switch: bool = False
    """Weights of their own for visual tokens in every layer, copies of the text's at the start (EVEv2)."""
    positions: Literal["grid", "text"] | None = None
    """M-RoPE: visual tokens stand at time, row and column (grid, the default there) or as text, all axes alike."""

    @model_validator(mode="after")
    def _one_origin(self) -> LanguageModelSpec:
        if self.source is None and self.config is None:
            raise ValueError("give source (hub id or path), config (an architecture from scratch), or both")
        return self


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class ModelSpec(StrictModel):
    """The parts a model is joined from."""

    language_model: LanguageModelSpec | None = None
    """What reads the visual tokens and writes the answer. Absent only where a visual tokenizer is trained by itself (stages of kind
    ``tokenizer``)."""
    encoders: dict[str, str | dict[str, Any]] = Field(default_factory=dict)
    """Your name → a shipped entry (`mllm list encoders`), or ``{preset: entry, …changes}``, or a whole config."""
    connector: dict[str, Any] | None = None
    """How features become visual tokens: a name (`mllm list connectors`), or ``{type: name, …settings}``."""
    views: dict[str, Any] | None = None
    """How a picture is looked at: ``{type: single}`` (the default: once, as a whole), ``tiles``, ``dual_perspective`` or
    ``native`` (at its own aspect ratio; without encoders the connector is given the patches themselves)."""
    video: dict[str, Any] | None = None
    """Which frames of a video are seen, by data, processor, ``generate`` and evaluation alike: ``{frames: 16}`` or ``{fps: 1,
    max_frames: 64}``, with ``which``, ``stamp`` and more (`mllm.processing.frames.VideoSpec`). None: the model takes no video."""
    router: dict[str, Any] | None = None
    """Which encoders run on which picture: ``{type: name, experts: [encoder names], …}`` (`mllm list routers`). None: all on every one."""
    visual_tokenizer: dict[str, Any] | None = None
    """What the model draws with: ``{encoder: name}`` (the tokenizer of that encoder), or ``{weights: folder}`` of a saved
    tokenizer, or a whole config, perhaps with ``weights``."""
    heads: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What the model answers besides text: your name → ``{type: …}`` (`mllm list heads`). One that draws (vocabulary, separate,
    depth, next_scale) writes the visual tokenizer's codes. A recipe's former ``visual_head`` is the head of that name."""
    chat_template: str | None = None
    """Shipped template's name, or a path to a Jinja file; default: the tokenizer's own."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Values of the chat template's own variables (``{enable_thinking: false}``), in training, `generate`, evaluation and
    serving alike. A request may still give others."""
    image_token: str = "<image>"
    """The text token that a visual token takes the place of; added to the tokenizer where it is missing."""

    @field_validator("connector", "views", "router", mode="before", json_schema_input_type=str | dict[str, Any] | None)
    @classmethod
    def _type_alone(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _former_head(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "visual_head" not in data:
            return data
        data = dict(data)
        former = data.pop("visual_head")
        if former is not None:
            data["heads"] = {"visual_head": former, **(data.get("heads") or {})}
        return data

    @field_validator("encoders", "heads")
    @classmethod
    def _names(cls, value: dict, info: ValidationInfo) -> dict:
        for name in value:
            if not name.isidentifier():
                raise ValueError(
                    f"{(info.field_name or 'part').rstrip('s')} name {name!r} must be a plain identifier (letters, digits, underscore)"
                )
        return value

    @model_validator(mode="after")
    def _joined(self) -> ModelSpec:
        if not self.encoders and self.connector is not None and (self.views or {}).get("type") == "native":
            side = int((self.views or {}).get("patch_size", 32))
            self.encoders = {
                "patches": {
                    "type": "raw_patches",
                    "patch_size": side,
                    "image_size": side * max(448 // side, 1),
                    **IMAGENET,
                }
            }
        if self.language_model is None:
            given = [n for n in ("encoders", "connector", "views", "router", "heads") if getattr(self, n)]
            if self.visual_tokenizer is None or given:
                raise ValueError("language_model: this key is required (a visual tokenizer alone is trained without)")
        if self.encoders and self.connector is None:
            raise ValueError("encoders are given but no connector; add e.g. connector: {type: mlp}")
        if self.connector is not None and not self.encoders:
            raise ValueError(
                "a connector is given but no encoder; add one, or views: {type: native} for an encoder-free model"
            )
        if self.video is not None and self.connector is None:
            raise ValueError("video is given but no connector; add encoders and e.g. connector: {type: average_pool}")
        if self.views is not None and self.connector is None:
            raise ValueError("views are given but no connector; add encoders and e.g. connector: {type: mlp}")
        return self

    @property
    def text_model(self) -> LanguageModelSpec:
        """The language model. Raises `ConfigError` where a visual tokenizer stands alone."""
        if self.language_model is None:
            raise ConfigError(
                "model: a visual tokenizer by itself, without a language model: it is trained by mllm train and looked at by "
                "mllm tokenizer eval"
            )
        return self.language_model


class LoraSpec(StrictModel):
    """LoRA adapter on the linear layers of one part."""

    r: int = Field(default=64, ge=1)
    """Rank of the two matrices."""
    alpha: float | None = None
    """Default 2 r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped in training."""
    target: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter, as PEFT's ``target_modules``."""
    use_dora: bool = False
    """Learn each column's length apart from its direction (DoRA)."""
    use_rslora: bool = False
    """Scale by alpha / √r instead of alpha / r (rsLoRA)."""
    added_tokens: bool = True
    """language_model: rows of tokens that were added to the source's (in the embedding, and in a head of its own) learn beside the
    adapter, by PEFT's ``trainable_token_indices``. False: they stay at their random start."""
    bits: Literal[4] | None = None
    """4: keep the adapted linear layers' own weights in 4-bit NormalFloat while the adapter learns (QLoRA); needs
    bitsandbytes, engine: none."""


class LearnSpec(StrictModel):
    """How one part learns."""

    renamed: ClassVar = {"rate": "lr"}

    lr: float = Field(gt=0)
    """Peak learning rate of the part."""
    weight_decay: float | None = None
    """Default: the optimizer's."""
    last_layers: int | None = Field(default=None, ge=1)
    """Encoders: unfreeze only the last layers (and the final norm)."""
    lora: LoraSpec | None = None
    """Learn an adapter on the part and keep its own weights as they are."""


class DrawSpec(StrictModel):
    """Pictures that a model with a visual head draws while it trains, to look at: PNG files under ``<output>/drawings``
    and TensorBoard."""

    prompts: list[str] = Field(min_length=1)
    """What to draw."""
    every: int = Field(default=500, ge=1)
    """Optimizer steps between drawings; the last step always draws."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is without."""
    temperature: float = Field(default=1.0, ge=0)
    """0: the likeliest code each time."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k likeliest codes; 0: from all."""
    top_p: float = Field(default=0.0, ge=0, le=1)
    """Draw from the likeliest codes that make up this share; 0: from all."""
    seed: int = 0
    """Seed of the drawing alone."""
    decoder: Literal["auto", "plain", "diffusion"] = "auto"
    """What paints the codes: plain, the visual tokenizer's own decoder; diffusion, the one trained beside it. auto: that where there is
    one and the tokenizer does not learn in this stage, else the plain one."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps of the diffusion decoder; default: its own."""
    guidance: float | None = Field(default=None, ge=0)
    """Scale of the diffusion decoder's guidance; default: its own."""


def reader_of(settings: Mapping[str, Any] | None) -> str | None:
    """Name of the encoder whose tokenizer a model draws with, of its ``visual_tokenizer: {encoder: NAME}``; None for a tokenizer of its
    own (some types have a key ``encoder`` too, which is a mapping)."""
    name = (settings or {}).get("encoder")
    return name if isinstance(name, str) else None


ALONE = ("tokenizer", "diffusion")
"""Kinds of stages that train a visual tokenizer, or a decoder beside it, without a language model."""


class StageSpec(StrictModel):
    """One stage: what learns, on what, for how long, how it is run."""

    renamed: ClassVar = {"precision": "dtype (float32 or bfloat16)"}

    name: str
    """The stage's folder below the output, and its name in overrides: ``stages.<name>.batch_size=4``."""
    kind: Literal[
        "sft",
        "routing",
        "tokenizer",
        "diffusion",
        "contrastive",
        "masked",
        "exits",
        "recognition",
        "agglomeration",
        "dpo",
        "grpo",
    ] = "sft"
    """sft: next-token loss on answers. routing teaches a router, contrastive an encoder on pairs, masked an encoder on
    pictures alone, exits an encoder that stops early (dynperceiver) on labelled pictures, recognition an encoder that reads
    text (UNIT), agglomeration one that learns what several others see, diffusion a decoder of a visual tokenizer's codes, dpo and
    grpo run TRL's trainers."""
    learn: dict[str, float | LearnSpec]
    """Part → learning rate, or a mapping with ``lr`` and more. Parts: ``language_model``, ``connector``, ``router``,
    ``visual_tokenizer`` (kind tokenizer: also ``visual_tokenizer.<part>``), ``diffusion_decoder`` (kind diffusion), ``encoders`` and
    ``heads`` (all), ``encoders.<name>``, ``heads.<name>``. Absent = frozen."""
    data: str | dict[str, Any] | list[Any]
    """Mixture's or dataset's name, a json, jsonl or table file, a folder, a hub id, a list of these, or an inline mixture. Kinds
    tokenizer and diffusion: pictures, as ``{type: folder, options: {path: …}}`` or a folder."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; give this or ``steps``."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or ``epochs``."""
    batch_size: int = Field(default=1, ge=1)
    """Samples (rows when packing) per process and micro-step."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Micro-steps that make one optimizer step; the loss is the mean over all their learned tokens."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of one row, visual tokens included."""
    chat_template: str | None = None
    """Template of this stage's data alone (``caption``: images and what is said about them, no questions; LLaVA's first
    stage). Default: the model's."""
    packing: bool = False
    """Put several samples into one row of ``max_length``; none sees another."""
    samples_per_step: int | None = Field(default=None, ge=1)
    """When packing: samples of one optimizer step over all processes, as many as a published run took unpacked. Each step packs
    exactly these, in as many micro-steps as their rows need."""
    group_by_length: bool = False
    """Batch samples of like length, so that less is padding."""
    max_tokens_per_batch: int | None = Field(default=None, ge=8)
    """Most tokens (rows × the longest, padding included) that a process computes at once. A padded micro-batch of more is split into
    several whose gradients add up to the same, so that the longest samples need no smaller ``batch_size``. At least ``max_length``."""
    engine: str | dict[str, Any] = "none"
    """none, sharded (ZeRO-1 in plain torch), zero1, zero2, zero3, fsdp2, a DeepSpeed json file, or auto: the fastest
    that fits, as measured, by the plan and the memory of the GPUs it is started on."""
    frozen_encoders: Literal["shared", "whole"] = "shared"
    """Under ZeRO-3, encoders that do not learn: shared like everything else and gathered for every picture, or whole on each GPU, which
    takes their bytes there and no communication. With other engines they are whole."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and products; with bfloat16 the optimizer keeps float32 copies of what learns."""
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """How gradients become updates."""
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    """How the rate changes over the stage."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    compile: bool = False
    """Compile each layer of the language model and encoders, and networks of convolutions as a whole, a visual tokenizer's too (CUDA)."""
    attention: str | None = None
    """HF attention implementation for the language model; default: variable-length kernels of torch where samples are packed or on CUDA.
    auto: these by the newest FlashAttention package (3 or 4) that is installed and right on this GPU for this model's heads."""
    float8: Literal["tensorwise"] | None = None
    """Multiply the decoder's linear layers in float8, one scale a tensor (torchao; CUDA of compute capability 8.9 and newer,
    a language model that learns whole). Faster products, slightly rounded: see benchmarks/results. Default: bf16 products."""
    cache_features: bool | Literal["auto", "float32", "bfloat16", "float16", "int8"] = False
    """Store frozen encoders' features on disk on first use, in the stage's dtype or the one given. auto: where possible."""
    save_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; beside these one is written every 20 minutes."""
    save_in_background: bool = False
    """Train on while a checkpoint is written, from host memory: of all processes, half of what `mllm plan` gives for checkpoints."""
    keep_state: bool = False
    """Keep the optimizer's state when the stage is done, so that ``mllm train --extend`` can go on with more steps."""
    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between records of metrics.jsonl and the trackers."""
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Processes that read and resize pictures, for each training process; 0: in the training process itself. auto: as many as reading took
    beside the first steps, at most a core each."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of a dataset's samples that may be unusable (each is named and replaced) before the run stops."""
    draw: DrawSpec | None = None
    """Pictures to draw while training (models with a visual head)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the stage's kind; of sft: ``robust`` (pictures turned, and changed against the model), ``drop_encoders``,
    ``word_contrast``, ``words_alone``."""
    _chosen: str = PrivateAttr("none")

    @property
    def engine_here(self) -> str | dict[str, Any]:
        """``engine``; for auto what `choose_here` has said on these GPUs, none before."""
        return self._chosen if self.engine == "auto" else self.engine

    @property
    def compiles_here(self) -> bool:
        """``compile``; not where ``engine: auto`` has become zero3, whose parameters are not whole inside a compiled layer."""
        return self.compile and not (self.engine == "auto" and self._chosen == "zero3")

    def choose_here(self, engine: str) -> None:
        """What ``engine: auto`` is on these GPUs. It is no part of the recipe: elsewhere a run goes on with another."""
        self._chosen = engine

    @model_validator(mode="after")
    def _length(self) -> StageSpec:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        if not self.learn:
            raise ValueError("learn is empty: nothing would be trained; name at least one part with a rate")
        for part, rate in self.learn.items():
            if isinstance(rate, float) and rate <= 0:
                raise ValueError(
                    f"learn.{part} is {rate}; a rate is positive, and a part that should not learn is left out"
                )
        return self

    def learning(self) -> dict[str, LearnSpec]:
        """``learn`` with every value as a `LearnSpec`."""
        return {part: v if isinstance(v, LearnSpec) else LearnSpec(lr=v) for part, v in self.learn.items()}


class EvaluationSpec(StrictModel):
    """What is asked of the last checkpoint when training is done."""

    tasks: list[str] = Field(default_factory=list)
    """Tasks and suites (`mllm list tasks`)."""
    limit: int | None = None
    """Only the first samples of each task."""
    batch_size: int = 8
    """Questions at once."""


class HardwareSpec(StrictModel):
    """What the recipe was written for; shown in the recipe table."""

    gpus: str = ""
    """Number and memory, such as ``8 × 80 GB``."""
    hours: str = ""
    """How long the whole run takes there."""
    note: str = ""
    """What else a reader should know."""


class Recipe(StrictModel):
    """A whole training run."""

    name: str
    """Default: the file's name."""
    description: str = ""
    """One line for the recipe table."""
    source: str = ""
    """Paper or repository the hyper-parameters are from."""
    plugins: list[str] = Field(default_factory=list)
    """Modules, or ``.py`` files seen from the working directory or from the recipe's folder, that register components."""
    seed: int = 0
    """Of fresh weights, the order of the data and dropout."""
    output: str = ""
    """Output folder; default ``runs/<name>``."""
    mirror: str = ""
    """Address on an object store (``s3://bucket/runs/my``) where checkpoints and finished stages are kept too, each complete or absent;
    ``--resume`` takes from there what the output folder lacks."""
    hardware: HardwareSpec = Field(default_factory=HardwareSpec)
    """What the recipe was written for."""
    model: ModelSpec
    """The parts that the model is joined from."""
    stages: list[StageSpec] = Field(min_length=1)
    """Trained in this order, each from the weights of the one before."""
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    """Run after the last stage."""
    track: list[Literal["wandb", "trackio"]] = Field(default_factory=list)
    """Services that get the numbers, beside metrics.jsonl and TensorBoard, which are always written."""

    @model_validator(mode="after")
    def _stage_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        if "final" in names:
            raise ValueError("a stage cannot be called 'final': that folder holds the last checkpoint")
        kinds = [stage.kind in ALONE for stage in self.stages]
        if self.model.language_model is None:
            for stage in self.stages:
                if stage.kind not in ALONE:
                    raise ValueError(
                        f"stages.{stage.name} is of kind {stage.kind}, and model has no language_model, which all kinds but tokenizer and "
                        "diffusion need"
                    )
        elif any(kinds):
            first = self.stages[0]
            if all(kinds) or kinds != sorted(kinds, reverse=True):
                raise ValueError(
                    f"stages: those of kind tokenizer and diffusion come first ({first.name} is of kind {first.kind}), and at least one "
                    "that trains the language_model's model behind them; a visual tokenizer alone has a recipe of its own (model: "
                    "{visual_tokenizer: …} alone)"
                )
            if self.model.visual_tokenizer is None:
                raise ValueError(
                    f"stages.{first.name} is of kind {first.kind}, and model has no visual_tokenizer: {{type: …}}"
                )
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")


def load_recipe(name: str, overrides: list[str] | None = None, *, trusted: bool = True) -> Recipe:
    """A recipe by name or path, its plug-ins loaded.

    Args:
        name: of a shipped recipe or one below ``$MLLM_PATH/recipes``, or a path to a YAML file.
        overrides: ``key.sub=value`` (list items by position or by their ``name``).
        trusted: False for a recipe that is only read, such as a checkpoint's: its plug-ins are left alone, and an earlier version may have
            written it.

    Returns:
        The recipe, every key checked.

    Raises:
        ConfigError: with the path to the key.
    """
    path = assets.find("recipes", name, kind="recipe")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level")
    data.setdefault("name", path.stem)
    if not trusted:
        data = upgraded(data)
    elif "tokenizer" in data and "stages" not in data:
        raise ConfigError(f"{path}: a tokenizer recipe of an earlier version, which had a format of its own; {CURE}")
    recipe = validate(Recipe, apply_overrides(data, overrides or []), where=path.name)
    if trusted:
        recipe.plugins = [seen_from_here(module, path.parent) for module in recipe.plugins]
        load_plugins(recipe.plugins)
    return recipe


def seen_from_here(module: str, folder: Path) -> str:
    """A recipe's plug-in as `load_plugins` takes it: a file that is not in the working directory lies beside the recipe."""
    beside = [folder / module, folder / Path(module).name]
    if not module.endswith(".py") or Path(module).expanduser().is_file():
        return module
    return next((os.path.relpath(path) for path in beside if path.is_file()), module)
