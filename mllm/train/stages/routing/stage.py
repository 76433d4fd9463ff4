"""How does a router learn from labels? The stage kind ``routing``: base encoders and router run, experts do not.

A ``gate`` learns hard or soft targets; for a ``language_model`` router the language model learns to answer the routing request
with the helpful experts' letters, seeing the short image. Labels are measured with the model at the start of the stage
(``options: {labels: measure}``, the default) or read from beside the data (``labels: data``, written by `mllm route label`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from mllm import distributed
from mllm.config import validate
from mllm.data.routing_labels import LabelRule, helpful_experts, labelled, open_sources, target_weights
from mllm.errors import ConfigError, DataError
from mllm.models.routing import routing_grid
from mllm.processing.chat import IGNORE, EncodedSample, encode_text, routing_inputs
from mllm.processing.images import load_image, to_pixels_multi
from mllm.processing.protocol import Processor
from mllm.processing.questions import question_text
from mllm.recipe import StageSpec
from mllm.routers.build import build_router
from mllm.train.checkpoint.export import save_stage
from mllm.train.prepare import DTYPES, give_dtype
from mllm.train.stages.kind import StageKind
from mllm.train.stages.routing.losses import label_source
from mllm.train.stages.routing.step import learning_to_route
from mllm.train.stages.wrapped_processor import WrappedProcessor
from mllm.train.start import start_model
from mllm.train.trainer import Run, train
from mllm.types import IMAGE_MARK, Sample, Turn

if TYPE_CHECKING:
    from mllm.models.configuration_mllm import MllmConfig
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


class RoutingOptions(LabelRule):
    """``options`` of a routing stage."""

    labels: Literal["measure", "data"] = "measure"
    """measure: compare losses with the model this stage starts from, once per run. data: use the label files beside the data."""
    batch_size: int = Field(default=16, ge=1)
    """Samples at once while measuring."""


class RoutingProcessor(WrappedProcessor):
    """A processor whose samples teach routing: what the model looks at is the same, what it learns is the label."""

    def __init__(self, processor: Processor, config: MllmConfig, options: RoutingOptions):
        super().__init__(processor)
        self.options = options
        if config.router is None:
            raise ConfigError(
                "a stage of kind routing needs a model with a router; add router: {type: gate, experts: […]}"
            )
        self.router: Any = build_router(config.router, 1, 1)
        self.by_text = self.router.asks_language_model
        if not self.by_text and not hasattr(self.router, "supervised_loss"):
            raise ConfigError(
                f"a {config.router['type']} router cannot be trained on labels; use gate or language_model"
            )
        self.top_k = options.top_k or self.router.config.top_k
        rows, cols = routing_grid(config.view_layout(), self.router) if self.by_text else (0, 0)
        self.image_tokens = rows * cols

    def encode_sample(self, sample: Sample, max_length: int | None = None) -> EncodedSample:
        """A labelled sample as tensors. Raises `DataError` naming it when its picture or text cannot be used."""
        where = f"sample {sample.id!r} of {sample.dataset}"
        losses = sample.meta.get("routing")
        if not isinstance(losses, dict) or not sample.images:
            raise DataError(f"{where}: no routing losses, or no picture")
        return (
            self._for_language_model(sample, losses, where, max_length)
            if self.by_text
            else self._for_gate(sample, losses, where)
        )

    def _for_gate(self, sample: Sample, losses: dict[str, float], where: str) -> EncodedSample:
        """One learned token per picture, so that the stage's loss is the mean over pictures whatever the batches."""
        count = len(sample.images)
        ids = torch.full((count + 1,), self.tokenizer.pad_token_id or 0, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE)
        labels[1:] = 0
        encoded = EncodedSample(sample.id, sample.dataset, ids, labels, num_images=count)
        encoded.pixels = base_pixels(self.inner, sample.images, where)
        target = target_weights(losses, self.router.config.experts, self.options, self.top_k)
        encoded.extras = {
            **routing_inputs(self.inner, sample.turns, count),
            "routing_targets": torch.tensor([target] * count),
        }
        return encoded

    def _for_language_model(
        self, sample: Sample, losses: dict[str, float], where: str, max_length: int | None
    ) -> EncodedSample:
        """The routing request about the first picture, and the letters to answer with."""
        content = next(turn.content for turn in sample.turns if IMAGE_MARK in turn.content)
        question = question_text(content, self.image_token)
        answer = self.router.target(helpful_experts(losses, margin=self.options.margin, top_k=self.top_k))
        turns = [Turn("user", f"{IMAGE_MARK}\n{self.router.prompt(question)}"), Turn("assistant", answer)]
        ids, labels = encode_text(self, turns, where=where)
        if max_length is not None and len(ids) > max_length:
            raise DataError(f"{where}: the routing request has {len(ids)} tokens, more than max_length={max_length}")
        encoded = EncodedSample(sample.id, sample.dataset, ids, labels, num_images=1)
        encoded.pixels = base_pixels(self.inner, sample.images[:1], where)
        encoded.extras = routing_inputs(self.inner, sample.turns, 1)
        return encoded


def base_pixels(processor: Processor, images: Sequence[Any], where: str) -> dict[str, torch.Tensor]:
    """Pixels of the encoders that always run, by batch key: all that a router looks at. Raises `DataError` opening with
    ``where``."""
    reader = processor.image_processor
    specs = {name: spec for name, spec in reader.specs.items() if name not in reader.experts}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in specs}
    if reader.rules.needs_size:
        raise ConfigError(
            f"views {reader.rules.views.type}: a router is trained and reported on whole pictures (views: {{type: single}})"
        )
    for position, image in enumerate(images):
        picture = load_image(image, where=f"{where}, image {position}", max_pixels=reader.max_pixels)
        for name, pixels in to_pixels_multi(picture, specs).items():
            rows[name].append(pixels)
    return processor.pixel_keys.by_key({name: torch.stack(tensors) for name, tensors in rows.items()})


def train_routing(run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
    """Train a router on labels; the same contract as `StageKind.train`."""
    where = f"stages.{stage.name}"
    options = validate(RoutingOptions, stage.options, where=f"{where}.options")
    for key in ("packing", "group_by_length", "max_tokens_per_batch"):
        if getattr(stage, key):
            raise ConfigError(f"{where}.{key}: a routing stage's samples are short, so it has no {key}; leave it out")
    model, processor = start_model(run.recipe, stage, previous)
    reader = RoutingProcessor(processor, model.config, options)
    expected = "language_model" if reader.by_text else "router"
    if expected not in stage.learn:
        raise ConfigError(f"{where}.learn: the part to train is {expected}; add e.g. learn: {{{expected}: 1.0e-3}}")
    data = labelled(
        stage.data, _measured(run, stage, model, processor, options) if options.labels == "measure" else None
    )
    with learning_to_route(model):
        engine = train(run, stage.model_copy(update={"data": data}), model, reader)
    del model
    if engine is None:
        return False
    save_stage(engine, processor, run.recipe, stage, folder, run.record())
    return True


def _measured(
    run: Run, stage: StageSpec, model: MllmForConditionalGeneration, processor: Processor, options: RoutingOptions
) -> Path:
    """The run's folder of label files, complete."""
    folder = run.output / "routing_labels" / stage.name
    device = distributed.local_device()
    give_dtype(model, DTYPES[stage.dtype])
    model.to(device)  # pyright: ignore[reportArgumentType]
    for source, rows in open_sources(stage.data):
        label_source(
            model,
            processor,
            source,
            folder / f"{source.name}.jsonl",
            rule=options,
            num_rows=rows,
            batch_size=options.batch_size,
            max_length=stage.max_length,
            made_by=f"{run.recipe.name}/{stage.name}",
            share=run.give_file,
        )
    return folder


class RoutingStage(StageKind):
    """A router learns from labels."""

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        return train_routing(run, stage, previous, folder)
