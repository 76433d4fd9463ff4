"""How does an encoder that may stop early learn when it knows enough? The stage kind ``exits``, for Dynamic Perceiver.

A sample is a picture and what the assistant says about it, one of a list of classes. All four exits answer; the last one, which sees
everything, also teaches the other three (self-distillation). The encoder and its early classifier go back into the model, so that
``confidence`` works from then on; parts behind the encoder's own last exit and the later classifiers are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field
from torch import nn

from mllm.config import StrictModel, validate
from mllm.encoders.backbones.dynperceiver import DynPerceiverEncoder
from mllm.encoders.backbones.dynperceiver_cnn import last_widths
from mllm.encoders.backbones.dynperceiver_exits import EXITS, Exits, accuracy, exit_losses
from mllm.encoders.base import VisionEncoder
from mllm.encoders.catalogue import build_encoder
from mllm.errors import ConfigError, DataError
from mllm.processing.chat import IGNORE, EncodedSample
from mllm.processing.images import to_pixels_multi
from mllm.processing.protocol import Processor
from mllm.recipe import StageSpec
from mllm.train.stages.kind import StageKind
from mllm.train.stages.one_encoder import EncoderModel, check_one_encoder, encoder_to_train, train_one_encoder
from mllm.train.stages.wrapped_processor import WrappedProcessor, one_picture
from mllm.train.trainer import Run
from mllm.types import Sample

PARTS = "exits"
_LABELS = "exit_labels"


class ExitsOptions(StrictModel):
    """``options`` of an exits stage; weights and distillation are the paper's."""

    classes: list[str] | str
    """The answers there are, in the order of the classifier's classes, or a text file with one a line."""
    early_weight: float = Field(default=0.5, ge=0)
    """Of the exits on latents, after stages 3 and 4."""
    cnn_weight: float = Field(default=1.0, ge=0)
    merge_weight: float = Field(default=1.0, ge=0)
    distill: float = Field(default=0.5, ge=0)
    """Weight of what the last exit teaches the others; 0: nothing."""
    temperature: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    exits_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the parts that are dropped afterwards; default: the encoder's."""

    def weights(self) -> dict[str, float]:
        return dict(zip(EXITS, (self.early_weight, self.early_weight, self.cnn_weight, self.merge_weight)))


def class_names(options: ExitsOptions, where: str) -> list[str]:
    """Raises `ConfigError` for a file that is not there, fewer than two classes, or one named twice."""
    names = options.classes
    if isinstance(names, str):
        file = Path(names).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"{where}.options.classes: no such file: {file}; give a list, or a text file with one class a line"
            )
        names = file.read_text(encoding="utf-8").splitlines()
    names = [name.strip() for name in names if name.strip()]
    twice = next((name for k, name in enumerate(names) if name in names[:k]), None)
    if len(names) < 2 or twice is not None:
        raise ConfigError(
            f"{where}.options.classes: " + (f"{twice!r} stands twice" if twice else "two classes or more are needed")
        )
    return names


class LabelReader(WrappedProcessor):
    """A processor whose samples are one picture and the number of its class."""

    def __init__(self, processor: Processor, name: str, classes: list[str]):
        super().__init__(processor)
        self.name, self.number_of = name, {label: k for k, label in enumerate(classes)}
        self.spec = processor.image_processor.specs[name]
        self.pixel_key = processor.pixel_keys[name]
        self.max_pixels = processor.image_processor.max_pixels

    def encode_sample(self, sample: Sample, max_length: int | None = None) -> EncodedSample:
        """Raises `DataError` naming a sample without picture, or whose answer is no class."""
        where = f"sample {sample.id!r} of {sample.dataset}"
        answer = next((turn.content.strip() for turn in sample.turns if turn.role == "assistant"), None)
        if not sample.images or answer is None:
            raise DataError(f"{where}: an exits stage needs a picture and an answer that names its class")
        if answer not in self.number_of:
            shown = ", ".join(list(self.number_of)[:8])
            raise DataError(
                f"{where}: the answer {answer[:60]!r} is none of the {len(self.number_of)} classes ({shown} …)"
            )
        picture = one_picture(sample, "an exits", max_pixels=self.max_pixels)
        labels = torch.tensor(
            [IGNORE, 0]
        )  # one learned position a picture, so the stage's loss is the mean over pictures
        result = EncodedSample(sample.id, sample.dataset, torch.zeros(2, dtype=torch.long), labels, num_images=1)
        result.pixels = {self.pixel_key: to_pixels_multi(picture, {self.name: self.spec})[self.name][None]}
        result.extras = {_LABELS: torch.tensor([self.number_of[answer]])}
        return result


class ExitsModel(EncoderModel):
    """An encoder, what lies behind its last exit, and all classifiers, as the trainer wants a model."""

    def __init__(self, name: str, encoder: DynPerceiverEncoder, options: ExitsOptions, pixel_key: str):
        super().__init__("exits", name, encoder, beside=PARTS, prefixes=("behind.", "exits."))
        self.options, self.pixel_key = options, pixel_key
        whole = {
            "output": "map",
            "exit": 4,
            "budget": None,
            "confidence": None,
            "weights": None,
            "classifier": True,
            "info": None,
        }
        full: Any = build_encoder(type(encoder).resolve(encoder.config.model_copy(update=whole)))
        shared: Any = encoder.model
        for part, module in shared.named_children():
            setattr(full.model, part, module)
        full.model.latent = shared.latent
        own = {part for part, _ in shared.named_children()}
        self.behind = nn.ModuleDict({part: module for part, module in full.model.named_children() if part not in own})
        self._full = [full]  # no child: its parts are those of encoder and behind
        config = encoder.config
        self.exits = Exits(full.model.widths, config.num_classes, last_widths(config))
        dtype = next(p.dtype for p in encoder.parameters())
        self.behind.to(dtype)
        self.exits.to(dtype)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.encoder.set_gradient_checkpointing(True)
        self._full[0].set_gradient_checkpointing(True)

    def train(self, mode: bool = True) -> ExitsModel:
        super().train(mode)
        self._full[0].training = mode
        return self

    def forward(self, num_items_in_batch: float, **inputs: Any) -> Any:
        """``loss``: the mean over these pictures, weighted by their share of ``num_items_in_batch``, all of the optimizer step."""
        options, pixels, labels = self.options, inputs[self.pixel_key], inputs[_LABELS]
        logits = self._full[0].logits(pixels, self.exits)
        losses = exit_losses(
            logits,
            labels,
            weights=options.weights(),
            distill=options.distill,
            temperature=options.temperature,
            smoothing=options.label_smoothing,
        )
        told = {f"exits/{name}": value.detach() for name, value in losses.items()}
        told |= {f"right/{name}": share for name, share in accuracy(logits, labels).items()}
        loss = torch.stack(list(losses.values())).sum()
        return SimpleNamespace(loss=loss * (len(pixels) / float(num_items_in_batch)), losses=told)


def check_exits(stage: StageSpec) -> ExitsOptions:
    """The stage's options. Raises `ConfigError` for settings that an exits stage cannot have."""
    where = f"stages.{stage.name}"
    options = validate(ExitsOptions, stage.options, where=f"{where}.options")
    check_one_encoder(stage, "an exits", because="sees pictures and classes only", lr="1.0e-3")
    class_names(options, where)
    return options


def build_exits(
    stage: StageSpec, options: ExitsOptions, encoders: Mapping[str, VisionEncoder], processor: Processor
) -> tuple[ExitsModel, LabelReader]:
    """Raises `ConfigError` for an encoder that is not there, has no exits, or other classes."""
    where, name = f"stages.{stage.name}", encoder_to_train(stage, encoders)
    encoder = encoders[name]
    if not isinstance(encoder, DynPerceiverEncoder):
        raise ConfigError(
            f"{where}: encoder {name} is of type {encoder.config.type}, which has no exits; dynperceiver has"
        )
    config = encoder.config
    classes = class_names(options, where)
    if not config.classifier or config.num_classes != len(classes) or config.output == "map":
        raise ConfigError(
            f"{where}: encoder {name} keeps what it learns here with output: latents, classifier: true, num_classes: {len(classes)}; set "
            "them in model.encoders"
        )
    reader = LabelReader(processor, name, classes)
    return ExitsModel(name, encoder, options, reader.pixel_key), reader


class ExitsStage(StageKind):
    """An encoder learns from labelled pictures when it may stop."""

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        check_exits(stage)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        options = check_exits(stage)
        build = partial(build_exits, stage, options)
        return train_one_encoder(run, stage, previous, folder, build, lr_beside=options.exits_lr)
