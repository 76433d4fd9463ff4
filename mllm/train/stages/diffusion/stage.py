"""How does a diffusion decoder learn beside a trained visual tokenizer? The stage kind ``diffusion``: the common engine, data, checkpoints
and records, and pictures sampled from held-out codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mllm import distributed
from mllm.errors import ConfigError
from mllm.odd_settings import interval_problems
from mllm.progress import phase
from mllm.recipe import Recipe, StageSpec
from mllm.train.beside import Beside
from mllm.train.checkpoint.export import save_stage
from mllm.train.engine.base import Engine
from mllm.train.engine.groups import learning_by_part
from mllm.train.observe.progress import StageDisplay
from mllm.train.stages.diffusion.model import DiffusionModel
from mllm.train.stages.kind import StageKind
from mllm.train.stages.tokenizer.pictures import PictureProcessor, picture_mixture
from mllm.train.stages.tokenizer.stage import NO_TEXT, Finished, check_picture_stage, spread_picks
from mllm.train.trainer import Run, train
from mllm.visual_tokenizers.base import DECODER_CONFIG, VisualTokenizer, build_tokenizer, stored_config
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder
from mllm.visual_tokenizers.evaluate import comparison_grid, evaluate_tokenizer
from mllm.visual_tokenizers.images import ImageSource, load_images, to_pixels
from mllm.visual_tokenizers.recipe import DiffusionTraining, diffusion_training


class BesideDiffusion(Beside):
    """The loss by name for the records, held-out scores on the way."""

    def __init__(self, model: DiffusionModel, training: DiffusionTraining, held_out: ImageSource):
        self.model, self.training, self.held_out = model, training, held_out
        self.scores: dict[str, Any] = {}
        self.engine: Engine | None = None

    def start(self, engine: Engine, *, step: int, total_steps: int, display: StageDisplay) -> None:
        for line in odd_diffusion_settings(self.training, total_steps, self.model.decoder):
            display.print(f"[yellow]! {self.training.stage.name}: {line}")
        self.engine = engine

    def step(self, step: int, *, last: bool) -> None:
        every = self.training.options.evaluate_every
        if every and step % every == 0 and not last:
            self.scores = self.evaluate()

    def evaluate(self) -> dict[str, Any]:
        """Scores of the plain decoder and of this one at the same held-out codes, pictures at the tokenizer's size, of the averaged weights
        where those are kept."""
        assert self.engine is not None
        decoder, training = self.model.decoder, self.model.training
        self.model.eval()
        with torch.random.fork_rng(devices=[]), self.engine.averaged():
            result = evaluate_tokenizer(
                decoder.tokenizer,
                self.held_out,
                batch_size=self.training.stage.batch_size,
                limit=self.training.options.evaluate_images,
                decoders={"diffusion": lambda codes: decoder.shrunk(decoder.decode(codes))},
            )
        self.model.train(training)
        return result

    def report(self) -> dict[str, Any]:
        record: dict[str, Any] = {"losses": {name: float(value) for name, value in self.model.named.items()}}
        if self.scores:
            record["evaluation"], self.scores = self.scores, {}
        return record


def start_decoder(training: DiffusionTraining, previous: Path | None) -> DiffusionDecoder:
    """The decoder beside the saved tokenizer, on the decoder of the stage before if there is one, else on published weights. Raises
    `CheckpointError` for files that are absent or do not fit, `ConfigError` for another decoder than the stage before trained."""
    folder = previous if previous is not None else Path(str(training.weights))
    tokenizer = VisualTokenizer.from_pretrained(folder)
    decoder = DiffusionDecoder(training.options.decoder, tokenizer)
    if previous is None or not (previous / DECODER_CONFIG).is_file():
        decoder.load_pretrained()
        return decoder
    before = tokenizer.diffusion
    try:
        decoder.load_state_dict(before.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"stages.{training.stage.name}.options.decoder: does not fit the one that the stage before trained: "
            + str(error).splitlines()[1].strip()
        ) from error
    return decoder


def train_decoder(run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
    """Train a diffusion decoder; the same contract as `StageKind.train`. ``folder`` then holds the tokenizer with the decoder
    (``VisualTokenizer.from_pretrained(folder).diffusion``), ``evaluation.json`` and ``grid.png``."""
    training, device = diffusion_training(run.recipe, stage), distributed.local_device()
    torch.manual_seed(run.recipe.seed)
    with phase("building the decoder"):
        decoder = start_decoder(training, previous)
        decoder.tokenizer.to(device)
        decoder.to(device)
    distributed.broadcast_state(decoder)
    images = load_images(training.images, decoder.image_side, "train")
    held_out = load_images(training.images, decoder.tokenizer.image.height, "held_out")
    model = DiffusionModel(decoder, training).train()
    beside = BesideDiffusion(model, training, held_out)
    # As in a tokenizer's stage: float32 weights, and networks that compute in bf16 by themselves.
    whole = stage.model_copy(update={"dtype": "float32"})
    processor: Any = PictureProcessor(images, decoder.tokenizer.tokens_per_image)
    engine = train(run, whole, model, processor, mixture=picture_mixture(training, images), beside=beside)
    if engine is None:
        return False
    scores = beside.evaluate()
    model.eval()
    with engine.averaged():
        pixels = to_pixels(held_out.batch(spread_picks(len(held_out))), device)
        drawn = {"diffusion": lambda codes: decoder.shrunk(decoder.decode(codes))}
        picture = comparison_grid(decoder.tokenizer, pixels, decoders=drawn)
    if run.info is not None:
        run.info.stage(stage.name, evaluation=scores)
    engine.model = decoder
    save_stage(engine, Finished(scores, picture), run.recipe, stage, folder, run.record())
    return True


def check_decoder(stage: StageSpec, recipe: Recipe) -> DiffusionTraining:
    """What the stage says. Raises `ConfigError` for settings that such a stage cannot have, a decoder that does not fit the tokenizer,
    `UnavailableError` without `diffusers`, and `DataError` for pictures that are not there."""
    training = diffusion_training(recipe, stage)
    check_picture_stage(stage, "diffusion", (*NO_TEXT, "compile"))
    autoencoder = training.options.decoder.autoencoder
    if autoencoder is not None and autoencoder.source is None:
        raise ConfigError(
            f"stages.{stage.name}.options.decoder.autoencoder.source: the autoencoder is frozen, and without trained weights its latents "
            "mean nothing; name a folder that diffusers' AutoencoderKL.save_pretrained wrote"
        )
    if training.weights is not None:
        stored_config(training.weights)
    with torch.device("meta"):
        tokenizer = build_tokenizer(training.tokenizer)
        model = DiffusionModel(DiffusionDecoder(training.options.decoder, tokenizer), training)
    learning_by_part(list(model.part_prefixes()), stage)
    load_images(training.images, model.decoder.image_side, "train")
    return training


def odd_diffusion_settings(training: DiffusionTraining, steps: int, decoder: DiffusionDecoder) -> list[str]:
    """One line for each setting of the options that cannot have been meant, in a stage of ``steps`` steps; decoder: perhaps on the meta
    device, for its sizes."""
    every: dict[str, tuple[int | None, str]] = {
        "options.evaluate_every": (training.options.evaluate_every, "it is evaluated at its end only")
    }
    return [*narrow_patches(decoder), *interval_problems(every, steps)]


def narrow_patches(decoder: DiffusionDecoder) -> list[str]:
    """Every patch of a transformer passes through one vector. What is to be told is noise in part, of which a narrower vector loses its
    share, however long it is trained; samples then stay noisy."""
    network: Any = decoder.network
    patch = getattr(network.config, "patch_size", None)
    if decoder.config.network not in ("dit", "sd3") or patch is None or decoder.config.prediction == "sample":
        return []
    width = int(network.config.num_attention_heads * network.config.attention_head_dim)
    values = decoder.channels * patch**2
    if values <= width:
        return []
    return [
        f"options.decoder.settings.patch_size {patch}: a patch holds {values} values and passes through a vector of {width} "
        f"(num_attention_heads x attention_head_dim), so {1 - width / values:.0%} of its noise can never be told and pictures "
        f"stay noisy; give a patch_size of at most {math.isqrt(width // decoder.channels)}, a width of {values} or more, or "
        "prediction: sample"
    ]


class DiffusionStage(StageKind):
    """A decoder learns to denoise pictures beside the codes of a tokenizer that stays as it is."""

    @classmethod
    def check(cls, stage: StageSpec, recipe: Recipe) -> None:
        check_decoder(stage, recipe)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        return train_decoder(run, stage, previous, folder)
