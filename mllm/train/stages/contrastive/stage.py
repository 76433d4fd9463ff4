"""How is a CLIP-style encoder itself trained on image–text pairs? The stage kind ``contrastive``.

The encoder learns inside the whole model it is the image side of (its last block, pooling, projection and text side included), and
goes back, tuned, into ours: the next stage of the recipe trains on with it. A pair is a sample's first image and what the assistant
says about it; hard negatives (Vision4Chart, arXiv 2503.18435: statements with another answer) and a teacher's scores of them lie
beside it in the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from mllm import distributed
from mllm.config import StrictModel, validate
from mllm.errors import ConfigError, DataError
from mllm.models import lora
from mllm.processing.chat import IGNORE, EncodedSample
from mllm.processing.images import to_pixels_multi
from mllm.processing.protocol import Processor
from mllm.recipe import LearnSpec, StageSpec
from mllm.train.checkpoint.export import save_stage
from mllm.train.engine.base import choose_engine
from mllm.train.stages.contrastive.dual_encoder import TEXT_PART, ContrastiveModel, build_dual, pass_weights
from mllm.train.stages.contrastive.losses import LossName
from mllm.train.stages.contrastive.words_dual import WordsDual
from mllm.train.stages.kind import StageKind
from mllm.train.stages.wrapped_processor import WrappedProcessor, one_picture
from mllm.train.start import start_model
from mllm.train.trainer import Run, seed_everything, train
from mllm.types import IMAGE_MARK, Sample


class ContrastiveOptions(StrictModel):
    """``options`` of a contrastive stage."""

    source: str | None = None
    """Hub id or folder of the whole model; default: where the encoder's own weights come from."""
    revision: str | None = None
    config: dict[str, Any] | None = None
    """A whole model from scratch: an HF config (``model_type: clip``, ``text_config``, ``vision_config``), or open_clip's."""
    tokenizer: str | None = None
    """Of the text side; default: ``source``."""
    words: str | None = None
    """A language model (folder, hub id, ``package:NAME``) from whose word embeddings a small text side is built, for an encoder of any
    type, which needs none of its own; set ``learn_text`` to a rate for weights from scratch (1e-3)."""
    loss: LossName = "infonce"
    learn_text: bool | float = True
    """The text side: true learns at the encoder's rate, a number at that rate, false keeps it as it is."""
    num_negatives: int = Field(default=0, ge=0)
    """Hard negative captions an image, taken from the front of its list; they are only compared with images."""
    negatives: str = "negatives"
    """Where a row keeps them: a key holding a text or a list of texts."""
    scores: str = "negative_scores"
    """Where it keeps a cross-encoder's scores of them, in the same order (needed for ``ranking_weight``)."""
    ranking_weight: float = Field(default=0.0, ge=0)
    """Weight of contrastive partial ranking distillation: the order of the negatives by those scores."""
    ranking_floor: float | None = None
    """Negatives the teacher scores at or below this are not put in order."""
    max_text_length: int | None = Field(default=None, ge=3)
    """Tokens of a caption, longer ones are cut (and counted); default: what the text side has positions for."""


class PairProcessor(WrappedProcessor):
    """A processor whose samples are one image with its caption and hard negatives."""

    def __init__(self, processor: Processor, name: str, dual: Any, options: ContrastiveOptions):
        super().__init__(processor)
        self.name, self.dual, self.options = name, dual, options
        self.spec = processor.image_processor.specs[name]
        self.pixel_key = processor.pixel_keys[name]
        self.max_pixels = processor.image_processor.max_pixels
        self.length = min(options.max_text_length or dual.max_length, dual.max_length)

    def encode_sample(self, sample: Sample, max_length: int | None = None) -> EncodedSample:
        """Raises `DataError` naming a sample without image, caption, or the negatives and scores it should have."""
        where = f"sample {sample.id!r} of {sample.dataset}"
        caption = next((t.content for t in sample.turns if t.role == "assistant" and t.content.strip()), None)
        if caption is None or not sample.images:
            raise DataError(f"{where}: a pair needs an image and something said about it")
        picture = one_picture(sample, "a contrastive", max_pixels=self.max_pixels)
        pixels = to_pixels_multi(picture, {self.name: self.spec})[self.name]
        negatives, scores = self._negatives(sample, where)
        texts = [caption.replace(IMAGE_MARK, " ").strip(), *negatives]
        encoded = [self.dual.tokenize(text, self.length) for text in texts]
        ids = torch.full((1, 1 + self.options.num_negatives, self.length), -1, dtype=torch.long)
        for place, (numbers, _) in enumerate(encoded):
            ids[0, place, : len(numbers)] = torch.tensor(numbers)
        # What is counted: the caption's tokens; one learned position a pair, so the stage's loss is the mean over pairs.
        counted = torch.zeros(max(2, len(encoded[0][0])), dtype=torch.long)
        labels = torch.full_like(counted, IGNORE)
        labels[-1] = 0
        result = EncodedSample(sample.id, sample.dataset, counted, labels, num_images=1)
        result.truncated = any(cut for _, cut in encoded)
        result.pixels, result.extras = {self.pixel_key: pixels[None]}, {"text_ids": ids}
        if self.options.ranking_weight:
            result.extras["teacher_scores"] = torch.tensor([scores])
        return result

    def _negatives(self, sample: Sample, where: str) -> tuple[list[str], list[float]]:
        wanted, options = self.options.num_negatives, self.options
        if not wanted:
            return [], []
        found = sample.meta.get(options.negatives)
        texts = [found] if isinstance(found, str) else list(found or [])
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                f"{where}: no hard negative under {options.negatives!r} (a text or a list of texts is expected)"
            )
        scores = [float("nan")] * wanted
        if options.ranking_weight:
            given = sample.meta.get(options.scores)
            given = [given] if isinstance(given, (int, float)) else list(given or [])
            if len(given) != len(texts):
                raise DataError(f"{where}: {len(texts)} negatives and {len(given)} scores under {options.scores!r}")
            scores[: len(given[:wanted])] = [float(value) for value in given[:wanted]]
        return texts[:wanted], scores


def train_contrastive(run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
    """Train an encoder on pairs; the same contract as `StageKind.train`. The whole tuned dual encoder is kept in
    ``<output>/dual_encoders/<stage>``."""
    options = check_contrastive(stage)
    where = f"stages.{stage.name}"
    model, processor = start_model(run.recipe, stage, previous)
    name = _encoder_name(stage, list(model.config.encoders))
    seed_everything(run.recipe.seed, f"{stage.name}/dual encoder", same=True)
    encoder = model.model.vision_tower.encoders[name]
    dual = build_dual(encoder, options, where=f"{where}.options")
    reader = PairProcessor(processor, name, dual, options)
    wrapped = ContrastiveModel(name, dual, options, pixel_key=reader.pixel_key)
    learn: dict[str, float | LearnSpec] = {f"encoders.{name}": next(iter(stage.learn.values()))}
    if options.learn_text:
        same = stage.learning()[next(iter(stage.learn))]
        learn[TEXT_PART] = same.lr if options.learn_text is True else float(options.learn_text)
    engine = train(run, stage.model_copy(update={"learn": learn}), wrapped, reader)
    if engine is None:
        return False
    if lora.has_adapters(wrapped):
        lora.merge(wrapped)
    dual.cpu()
    if not isinstance(dual, WordsDual):
        pass_weights(encoder, dual, to_encoder=True)
    if distributed.is_main():
        dual.save(run.output / "dual_encoders" / stage.name)
    engine.model = model
    save_stage(engine, processor, run.recipe, stage, folder, run.record())
    return True


def check_contrastive(stage: StageSpec) -> ContrastiveOptions:
    """The stage's options. Raises `ConfigError` for settings that a contrastive stage cannot have."""
    where = f"stages.{stage.name}"
    options = validate(ContrastiveOptions, stage.options, where=f"{where}.options")
    for key in ("packing", "group_by_length", "max_tokens_per_batch", "compile", "chat_template"):
        if getattr(stage, key):
            raise ConfigError(
                f"{where}.{key}: a contrastive stage compares whole captions and has no {key}; leave it out"
            )
    if stage.cache_features:
        raise ConfigError(f"{where}.cache_features: the encoder learns here, so its features change; leave it out")
    if choose_engine(stage).shares_weights:
        raise ConfigError(
            f"{where}.engine: a dual encoder is small; use none, sharded, zero1 or zero2 (zero3 and fsdp2 cut every layer)"
        )
    if options.words is not None and (options.source or options.config or options.tokenizer):
        raise ConfigError(f"{where}.options.words: builds the text side; leave out source, config and tokenizer")
    if options.ranking_weight and options.num_negatives < 2:
        raise ConfigError(f"{where}.options.ranking_weight: an order needs num_negatives of 2 or more")
    if options.ranking_floor is not None and not options.ranking_weight:
        raise ConfigError(f"{where}.options.ranking_floor is given but ranking_weight is 0")
    if len(stage.learn) != 1 or not next(iter(stage.learn)).startswith("encoders"):
        raise ConfigError(
            f"{where}.learn: a contrastive stage trains one encoder, e.g. learn: {{encoders.vision: 5.0e-6}} (its text side: "
            "options.learn_text)"
        )
    return options


def _encoder_name(stage: StageSpec, known: list[str]) -> str:
    part = next(iter(stage.learn))
    if part == "encoders":
        if len(known) != 1:
            raise ConfigError(
                f"stages.{stage.name}.learn: a contrastive stage trains one encoder; name it: "
                + " or ".join(f"encoders.{name}" for name in known)
            )
        return known[0]
    return part.removeprefix("encoders.")


class ContrastiveStage(StageKind):
    """A CLIP-style encoder learns from pairs."""

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        check_contrastive(stage)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        return train_contrastive(run, stage, previous, folder)
