"""How is a visual tokenizer trained? The stage kind ``tokenizer``: the common engine, data, checkpoints and records, beside which
a discriminator may learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mllm import distributed
from mllm.errors import ConfigError
from mllm.odd_settings import interval_problems
from mllm.progress import phase
from mllm.recipe import Recipe, StageSpec
from mllm.train.beside import Beside
from mllm.train.checkpoint.export import save_stage
from mllm.train.engine.base import Engine, choose_engine
from mllm.train.engine.groups import learning_by_part
from mllm.train.observe.progress import StageDisplay
from mllm.train.stages.kind import StageKind
from mllm.train.stages.tokenizer.adversary import Adversary
from mllm.train.stages.tokenizer.model import TokenizerModel, start_tokenizer
from mllm.train.stages.tokenizer.pictures import PictureProcessor, picture_mixture
from mllm.train.trainer import Run, train
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.evaluate import comparison_grid, evaluate_tokenizer
from mllm.visual_tokenizers.images import ImageSource, load_images, to_pixels
from mllm.visual_tokenizers.quantizers.initialise import initialise_codebooks
from mllm.visual_tokenizers.recipe import TokenizerTraining, tokenizer_training
from mllm.visual_tokenizers.teacher import TEACHER_FILE, build_teacher

NO_TEXT = (
    "packing",
    "group_by_length",
    "max_tokens_per_batch",
    "chat_template",
    "cache_features",
    "draw",
    "attention",
    "float8",
)
"""Settings of stages with a language model."""


class Finished:
    """What lies beside the weights of a finished tokenizer: held-out scores, and originals above reconstructions."""

    def __init__(self, scores: dict[str, Any], picture: Image.Image):
        self.scores, self.picture = scores, picture

    def save_pretrained(self, folder: str | Path) -> None:
        text = json.dumps(self.scores, indent=2) + "\n"
        (Path(folder) / "evaluation.json").write_text(text, encoding="utf-8")
        self.picture.save(Path(folder) / "grid.png")


class BesideTokenizer(Beside):
    """The discriminator's step, named losses and usage for the records, held-out scores on the way."""

    def __init__(
        self, model: TokenizerModel, training: TokenizerTraining, adversary: Adversary | None, held_out: ImageSource
    ):
        self.model, self.training, self.adversary, self.held_out = model, training, adversary, held_out
        self.discriminator_loss: Tensor | None = None
        self.scores: dict[str, Any] = {}
        self.engine: Engine | None = None

    def start(self, engine: Engine, *, step: int, total_steps: int, display: StageDisplay) -> None:
        for line in odd_tokenizer_settings(self.training, total_steps):
            display.print(f"[yellow]! {self.training.stage.name}: {line}")
        self.engine, self.model.number = engine, step
        self.model.set_modes()
        if self.adversary is not None:
            self.adversary.start(engine.device)

    def step(self, step: int, *, last: bool) -> None:
        if self.adversary is not None:
            self.discriminator_loss = self.adversary.step()
        self.model.number = step
        every = self.training.options.evaluate_every
        if every and step % every == 0 and not last:
            self.scores = self.evaluate(self.training.options.evaluate_images)

    def evaluate(self, limit: int | None = None) -> dict[str, Any]:
        """Held-out scores (`mllm.visual_tokenizers.evaluate`), of the averaged weights where those are kept."""
        assert self.engine is not None
        tokenizer = self.model.tokenizer
        with torch.random.fork_rng(devices=[]), self.engine.averaged():
            result = evaluate_tokenizer(
                tokenizer.eval(), self.held_out, batch_size=self.training.stage.batch_size, limit=limit
            )
        self.model.set_modes()
        return result

    def report(self) -> dict[str, Any]:
        names, values = list(self.model.named), list(self.model.named.values())
        if self.discriminator_loss is not None:
            names, values = [*names, "discriminator"], [*values, self.discriminator_loss]
        numbers = torch.stack([value.double() for value in values]).tolist() if values else []
        record: dict[str, Any] = {"losses": dict(zip(names, numbers))}
        if self.scores:
            record["evaluation"], self.scores = self.scores, {}
        return record

    def state(self) -> dict[str, Tensor]:
        return {} if self.adversary is None else self.adversary.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        if self.adversary is not None:
            self.adversary.restore(state)


def train_tokenizer(run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
    """Train a visual tokenizer; the same contract as `StageKind.train`. ``folder`` then holds the tokenizer
    (`VisualTokenizer.from_pretrained`), ``evaluation.json`` and ``grid.png``."""
    training = tokenizer_training(run.recipe, stage)
    options, device = training.options, distributed.local_device()
    torch.manual_seed(run.recipe.seed)
    with phase("building the tokenizer"):
        init = options.init or (None if previous is None else str(previous))
        tokenizer = start_tokenizer(training.tokenizer, options, init).to(device).train()
    size = tokenizer.image.height
    images, held_out = (load_images(training.images, size, split) for split in ("train", "held_out"))
    if options.kmeans:
        with phase("putting codebooks on k-means centres"):
            picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.recipe.seed))
            pixels = to_pixels(images.batch(picks[: options.kmeans].tolist()), device)
            initialise_codebooks(tokenizer, pixels, stage.batch_size, seed=run.recipe.seed)
    distributed.broadcast_state(tokenizer)
    teacher, adversary = _teacher(run, training, tokenizer, images), _adversary(training)
    model = TokenizerModel(tokenizer, training, teacher, adversary)
    beside = BesideTokenizer(model, training, adversary, held_out)
    # Weights stay in fp32 and the networks compute in bf16 by themselves: codebooks and the search for the nearest code are
    # never rounded.
    whole = stage.model_copy(update={"dtype": "float32"})
    processor: Any = PictureProcessor(images, tokenizer.tokens_per_image)
    engine = train(run, whole, model, processor, mixture=picture_mixture(training, images), beside=beside)
    if engine is None:
        return False
    scores = beside.evaluate()
    picture = comparison_grid(tokenizer.eval(), to_pixels(held_out.batch(spread_picks(len(held_out))), device))
    if run.info is not None:
        run.info.stage(stage.name, evaluation=scores)
    engine.model = tokenizer
    save_stage(engine, Finished(scores, picture), run.recipe, stage, folder, run.record())
    return True


def _teacher(
    run: Run, training: TokenizerTraining, tokenizer: VisualTokenizer, images: ImageSource
) -> nn.Module | None:
    """The main process first: a supervised teacher is trained once and read by the others."""
    if training.teacher is None:
        return None
    teacher, file = None, run.output / TEACHER_FILE
    run.give_file(file)
    for turn in (True, False):
        if distributed.is_main() == turn:
            seed = run.recipe.seed
            teacher = build_teacher(training.teacher, tokenizer, images, seed=seed, directory=run.output)
        run.give_file(file)
        distributed.barrier()
    return teacher


def _adversary(training: TokenizerTraining) -> Adversary | None:
    spec, stage = training.losses.adversarial, training.stage
    if spec is None:
        return None
    lr = max(learned.lr for learned in stage.learning().values())
    return Adversary(spec, lr=lr, max_grad_norm=stage.optimizer.max_grad_norm, autocast=stage.dtype == "bfloat16")


def check_tokenizer(stage: StageSpec, recipe: Recipe) -> TokenizerTraining:
    """What the stage says. Raises `ConfigError` for settings that a tokenizer stage cannot have, parts that its tokenizer
    lacks, and `DataError` for pictures that are not there."""
    training = tokenizer_training(recipe, stage)
    check_picture_stage(stage, "tokenizer", (*NO_TEXT, "gradient_checkpointing"))
    with torch.device("meta"):
        model = TokenizerModel(build_tokenizer(training.tokenizer), training_without_networks(training), None, None)
    learning_by_part(list(model.part_prefixes()), stage)
    load_images(training.images, model.tokenizer.image.height, "train")
    return training


def check_picture_stage(stage: StageSpec, kind: str, passed_over: tuple[str, ...]) -> None:
    """Raises `ConfigError` for settings that a stage which learns from single pictures cannot have. passed_over: those that would be
    without effect."""
    where = f"stages.{stage.name}"
    for key in passed_over:
        if getattr(stage, key):
            raise ConfigError(
                f"{where}.{key}: a {kind} stage learns from single pictures and has no {key}; leave it out"
            )
    if choose_engine(stage).shares_weights:
        raise ConfigError(
            f"{where}.engine: a {kind} stage's networks are small; use none, sharded, zero1 or zero2 (zero3 and fsdp2 cut every layer)"
        )
    if any(spec.lora is not None or spec.last_layers is not None for spec in stage.learning().values()):
        raise ConfigError(f"{where}.learn: the parts of a {kind} stage learn whole; take lora and last_layers out")


def spread_picks(number: int, wanted: int = 8) -> list[int]:
    """Up to ``wanted`` of ``number`` places, evenly from the first to the last."""
    chosen = min(wanted, number)
    return [round(i * (number - 1) / max(1, chosen - 1)) for i in range(chosen)]


def training_without_networks(training: TokenizerTraining) -> TokenizerTraining:
    """The same without teacher, perceptual network and discriminator, whose weights need not be here to plan."""
    losses = training.losses.model_copy(update={"semantic": None, "perceptual": None, "adversarial": None})
    options = training.options.model_copy(update={"teacher": None, "losses": losses})
    return TokenizerTraining(training.recipe, training.stage, training.tokenizer, training.images, options)


def odd_tokenizer_settings(training: TokenizerTraining, steps: int) -> list[str]:
    """One line for each setting of the options that cannot have been meant, in a stage of ``steps`` steps."""
    adversarial = training.losses.adversarial
    every: dict[str, tuple[int | None, str]] = {
        "options.evaluate_every": (training.options.evaluate_every, "it is evaluated at its end only"),
        "options.losses.adversarial.start": (
            adversarial.start if adversarial else None,
            "the discriminator never joins in",
        ),
    }
    return interval_problems(every, steps)


class TokenizerStage(StageKind):
    """A visual tokenizer learns to say what pictures show in codes."""

    @classmethod
    def check(cls, stage: StageSpec, recipe: Recipe) -> None:
        check_tokenizer(stage, recipe)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        return train_tokenizer(run, stage, previous, folder)
