"""How does the model answer with masks? A token of the answer stands for each; its hidden state prompts a mask decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mllm.errors import AlignmentError, ConfigError, did_you_mean
from mllm.heads import HEADS
from mllm.heads.base import Head, HeadConfig, HeadLoss, HeadModel, HeadParts, Reading, Step
from mllm.heads.pictures import pictures_before
from mllm.heads.running_norm import RunningNorm
from mllm.heads.segmentation.decoders import DECODERS, DecoderConfig, QueryDecoderConfig
from mllm.heads.segmentation.in_context import Examples, ExamplesConfig, InContextPrompts, on_grid
from mllm.heads.segmentation.losses import (
    BCE_WEIGHT,
    DICE_WEIGHT,
    batch_dice,
    batch_focal,
    iou_error,
    mask_bce,
    mask_dice,
)
from mllm.types import EncoderInfo, ImageSpec, VisionFeatures

IGNORE = -100
LOSSES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "bce": lambda logits, targets, _: mask_bce(logits, targets).mean(),
    "dice": lambda logits, targets, _: mask_dice(logits, targets).mean(),
    "focal": lambda logits, targets, _: batch_focal(logits, targets),
    "batch_dice": lambda logits, targets, _: batch_dice(logits, targets),
    "iou": iou_error,
}


class SegmentationHeadConfig(HeadConfig):
    """Masks by ``[SEG]`` tokens (LISA, arXiv 2308.00692)."""

    type: Literal["segmentation"] = "segmentation"
    encoder: str
    """The encoder of the model whose features the masks are read from; it runs once, for words and masks alike."""
    token: str = "[SEG]"
    """Stands for one mask in the answer."""
    state: Literal["predict", "self"] = "predict"
    """Which hidden state is a mask's: the one that predicts its token (LISA), or the token's own (Sa2VA). Weights trained with one do
    not work with the other."""
    states: int = Field(default=1, ge=1)
    """How many states tell a mask: its own, and those before it that wrote the same answer, side by side (zeros where it has fewer). One
    is LISA's. A model that learns from nothing passes an answer's last word on to its mask and hardly those before: with 3,
    "… the red square [SEG]" says both words."""
    norm: Literal["none", "running"] = "none"
    """What happens to the state before its projection. ``running`` takes out what all states share (`RunningNorm`): a head that starts
    from nothing learns with it in a few hundred steps, and without it hardly. ``none`` is LISA's."""
    decoder: DecoderConfig = Field(default_factory=QueryDecoderConfig)
    weights: dict[str, float] = Field(default_factory=lambda: {"bce": BCE_WEIGHT, "dice": DICE_WEIGHT})
    """Loss → its weight beside the words' 1; only these are computed. ``bce`` and ``dice`` are LISA's (2 and 0.5 as published), ``focal``,
    ``batch_dice`` and ``iou`` SAM-UNet's (20, 1, 1); ``iou`` needs a decoder of type sam."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Probability above which a pixel is marked, wherever masks are answered: `segment`, edits, chat, evaluation and serving. It changes
    nothing in training; choose it on validation pictures and write it into the checkpoint (`mllm.heads.build.keep_in_head`)."""
    question: str = "Please segment {phrase}."
    """How `segment` asks for what ``{phrase}`` names."""
    examples: ExamplesConfig | None = None
    """Whether a question may show another picture with a mask (DC-SAM, arXiv 2504.12080); with a decoder of type query or sam. None: it
    may not."""

    @field_validator("weights")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in LOSSES:
                raise ValueError(f"no loss {name!r}{did_you_mean(name, LOSSES)}; the losses are {', '.join(LOSSES)}")
        if not value:
            raise ValueError("no loss is named; the head would learn nothing")
        return value

    @model_validator(mode="after")
    def _scored(self) -> SegmentationHeadConfig:
        if "iou" in self.weights and self.decoder.type != "sam":
            raise ValueError(f"weights.iou: a {self.decoder.type} decoder does not say how well it does; take iou out")
        return self

    @model_validator(mode="after")
    def _prompted(self) -> SegmentationHeadConfig:
        if self.examples is not None and self.decoder.type not in ("query", "sam"):
            raise ValueError(f"examples: a {self.decoder.type} decoder takes one prompt a mask; use query or sam")
        if self.examples is not None and self.decoder.width % self.examples.heads:
            raise ValueError(
                f"examples.heads: {self.examples.heads} do not divide decoder.width ({self.decoder.width})"
            )
        if self.examples is not None and self.examples.token == self.token:
            raise ValueError(f"examples.token is {self.token}, which stands for the masks of answers; name another")
        return self

    @field_validator("question")
    @classmethod
    def _asks(cls, value: str) -> str:
        if "{phrase}" not in value:
            raise ValueError(f"{value!r} has no place for what is asked for; write {{phrase}} there")
        return value


@dataclass
class LaidMasks:
    """targets ``(K, rows, columns)`` uint8; places ``(K, 2)``: row and column of the hidden state of each; begins ``(K,)``: column of the
    state that wrote its answer's first token; owners ``(K,)``: the number of its picture in the batch; examples: what the questions show,
    None where they show nothing."""

    targets: Tensor
    places: Tensor
    begins: Tensor
    owners: Tensor
    examples: Examples | None = None


@HEADS.register("segmentation")
class SegmentationHead(Head):
    """Hidden states ``(K, L)`` → projection → mask decoder on the features of each mask's picture."""

    Config = SegmentationHeadConfig
    config: SegmentationHeadConfig
    targets = ("target_masks", "target_examples")
    special_tokens = False
    zero3 = True
    without_gradient = ("iou_prediction_head", "mlps.1.", "mlps.2.", "mlps.3.")

    def __init__(self, config: SegmentationHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        if config.encoder not in parts.encoders:
            raise ConfigError(
                f"a segmentation head reads encoder {config.encoder!r}, which this model has not"
                f"{did_you_mean(config.encoder, parts.encoders)}; its encoders: {', '.join(parts.encoders) or 'none'}"
            )
        self.decoder = DECODERS[config.decoder.type](config.decoder, parts.encoders[config.encoder])
        width, image = config.decoder.width, parts.encoders[config.encoder].image
        self.target_sizes = (image.height, image.width), self.decoder.size  # the second: as processors saved it before
        self.norm = self._new_norm()
        self.norms_before = nn.ModuleList(self._new_norm() for _ in range(config.states - 1))
        read = config.states * parts.width
        self.project = nn.Sequential(nn.Linear(read, parts.width), nn.ReLU(), nn.Linear(parts.width, width))
        if config.examples is not None:
            shown, seen = config.examples, parts.encoders[config.encoder].width
            self.in_context = InContextPrompts(width, seen, shown.queries, shown.heads, shown.mlp_width)

    def _new_norm(self) -> nn.Module:
        return RunningNorm(self.width) if self.config.norm == "running" else nn.Identity()

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        info = EncoderInfo(image=ImageSpec(height=16, width=16), grid=(4, 4), width=24)
        decoder = {"type": "query", "width": 16, "depth": 1, "heads": 2}
        return {"type": cls.name, "encoder": "eye", "decoder": decoder}, HeadParts(32, {"eye": info})

    def example(self, parts: HeadParts, batch: int) -> tuple[Step, dict[str, Tensor]]:
        ids = torch.tensor([1, IMAGE_ID, 2, self.config.tokens["mark"], 3]).repeat(batch, 1)
        masks = torch.zeros(batch, *self.target_sizes[0], dtype=torch.uint8)
        masks[:, :5, :7] = 1
        return Step(ids, ids.clone()), {"target_masks": masks}

    @classmethod
    def tokens(cls, config: SegmentationHeadConfig, parts: HeadParts) -> list[str]:
        return [config.token, *([] if config.examples is None else [config.examples.token])]

    @classmethod
    def resolve(
        cls, config: SegmentationHeadConfig, parts: HeadParts, id_of: Callable[[str], int], *, null: int
    ) -> Any:
        example = {} if config.examples is None else {"example": id_of(config.examples.token)}
        return config.model_copy(update={"tokens": {"mark": id_of(config.token), **example}})

    @classmethod
    def reads(cls, config: SegmentationHeadConfig) -> tuple[str, ...]:
        return (config.encoder,)

    def load_pretrained(self) -> None:
        """Read the decoder's published weights, where the config names some."""
        if getattr(self.config.decoder, "weights", None) is not None:
            self.decoder.load_pretrained()

    def lay(self, model: HeadModel, step: Step, targets: Mapping[str, Tensor]) -> LaidMasks:
        masks, ids, mark = targets["target_masks"], step.input_ids, self.config.tokens["mark"]
        assert ids is not None
        taught = ids if step.labels is None else step.labels
        marks = (taught == mark).nonzero()
        if len(marks) != len(masks):
            raise AlignmentError(
                f"{len(masks)} masks for {len(marks)} {self.config.token} that are learned; was the batch made by this model's own "
                "processor and not cut before its masks?"
            )
        if tuple(masks.shape[1:]) not in self.target_sizes:
            raise AlignmentError(
                f"masks of {tuple(masks.shape[1:])} for an encoder that sees {self.target_sizes[0]}; was the batch made by this model's "
                "own processor?"
            )
        owners = owners_of(model, ids, marks, step.inputs.get("image_sizes"))
        examples = self._examples(model, step, marks, targets.get("target_examples"))
        return LaidMasks(masks, self.places(marks), answer_begins(taught, marks), owners, examples)

    def _examples(self, model: HeadModel, step: Step, marks: Tensor, given: Tensor | None) -> Examples | None:
        """The examples of a batch, and for each of its marks ``(K, 2)`` the last one before it in its conversation."""
        ids, number = step.input_ids, 0 if given is None else len(given)
        assert ids is not None
        if self.config.examples is None:
            if number:
                raise AlignmentError(
                    f"{number} example masks for a head without examples; set model.heads.NAME.examples: {{}}"
                )
            return None
        shown = (ids == self.config.tokens["example"]).nonzero()
        if len(shown) != number:
            raise AlignmentError(
                f"{number} example masks for {len(shown)} {self.config.examples.token} in the batch; was it made by this model's own "
                "processor?"
            )
        if given is None or not number:
            return None
        if tuple(given.shape[1:]) not in self.target_sizes:
            raise AlignmentError(
                f"example masks of {tuple(given.shape[1:])} for an encoder that sees {self.target_sizes[0]}; was the batch made by this "
                "model's own processor?"
            )
        before = (shown[:, 0] == marks[:, :1]) & (shown[:, 1] < marks[:, 1:])
        positions = step.position_ids
        if positions is not None and positions.dim() == 2:  # several conversations in a row, each from position 0
            parts = (positions == 0).cumsum(1)
            before &= parts[shown[:, 0], shown[:, 1]] == parts[marks[:, 0], marks[:, 1]][:, None]
        numbers = torch.arange(number, device=ids.device)
        which = torch.where(before, numbers, -1).amax(1)
        return Examples(given, owners_of(model, ids, shown, step.inputs.get("image_sizes")), which)

    def places(self, marks: Tensor) -> Tensor:
        """Row and column of the tokens ``(K, 2)`` → of their hidden states."""
        return marks - marks.new_tensor([0, 1]) if self.config.state == "predict" else marks

    def predict(
        self,
        hidden: Tensor,
        places: Tensor,
        owners: Tensor,
        features: VisionFeatures,
        examples: Examples | None = None,
        begins: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden ``(B, T, L)`` and where the masks' states are in it → logits ``(K, rows, columns)`` on what the encoder sees, and
        predicted IoU ``(K,)`` where the decoder gives any. examples: what the questions show; begins ``(K,)``: columns where the states of
        the masks' answers begin, 0 by default."""
        weight = self.project[0].weight
        tokens = features.tokens.to(weight.device, weight.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
        prompts = self.project(self.read_states(hidden.to(weight.dtype), places, begins))  # pyright: ignore[reportArgumentType, reportCallIssue]
        owners = owners.to(weight.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if examples is None or not bool((examples.which >= 0).any()):
            return self.decoder(prompts, tokens, owners)
        return self._by_example(prompts, tokens, owners, examples)

    def read_states(self, hidden: Tensor, places: Tensor, begins: Tensor | None) -> Tensor:
        """hidden ``(B, T, L)`` → normed states of masks ``(K, states · L)``, each its own first, then those before it."""
        rows, columns = places.unbind(1)
        begins = torch.zeros_like(columns) if begins is None else begins
        parts = [self.norm(hidden[rows, columns])]
        for back, norm in enumerate(self.norms_before, 1):
            there = columns - back >= begins
            part = torch.zeros_like(parts[0])
            part[there] = norm(hidden[rows[there], columns[there] - back])
            parts.append(part)
        return torch.cat(parts, 1)

    def _by_example(
        self, prompts: Tensor, tokens: Tensor, owners: Tensor, examples: Examples
    ) -> tuple[Tensor, Tensor | None]:
        """As `predict`, where some masks ``(K, C)`` have an example: their prompts are its own beside the state's."""
        which = examples.which.to(owners.device)
        some, others = (which >= 0).nonzero()[:, 0], (which < 0).nonzero()[:, 0]
        marked, other = examples.owners.to(owners.device)[which[some]], owners[some]
        cells = on_grid(examples.masks.to(owners.device), self.decoder.grid).to(tokens.dtype)[which[some]]
        seen = self.decoder.seen(tokens)
        told = self.in_context(tokens[marked], tokens[other], cells, seen[marked], seen[other])
        logits, scores = self.decoder(torch.cat([prompts[some, None], told], 1), tokens, other)
        if not len(others):
            return logits, scores
        more, more_scores = self.decoder(prompts[others], tokens, owners[others])
        back = torch.argsort(torch.cat([some, others]))
        scores = None if scores is None or more_scores is None else torch.cat([scores, more_scores])[back]
        return torch.cat([logits, more])[back], scores

    def losses(self, model: HeadModel, step: Step, laid: LaidMasks, reading: Reading) -> HeadLoss:
        if self.config.encoder not in reading.features:
            raise AlignmentError(
                f"masks are read from encoder {self.config.encoder!r}, and the call has no pixels for it (image_features given instead?)"
            )
        logits, scores = self.predict(
            reading.hidden,
            laid.places,
            laid.owners,
            reading.features[self.config.encoder],
            laid.examples,
            laid.begins,
        )
        targets = laid.targets.to(logits.device)
        logits = raised(logits, tuple(targets.shape[1:]))
        found = {name: LOSSES[name](logits, targets, scores) for name in self.config.weights}
        total = sum(self.config.weights[name] * loss for name, loss in found.items())
        return HeadLoss(step.share() * total + self.idle(), {name: loss.detach() for name, loss in found.items()})


def raised(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits ``(K, rows, columns)`` on the decoder's grid → ``(K, *size)`` fp32, as `restore` lays them on the encoder's input: what is
    trained is then what is answered, and an edge may run through a cell of the grid."""
    if tuple(logits.shape[1:]) == size:
        return logits
    return nn.functional.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def answer_begins(labels: Tensor, marks: Tensor) -> Tensor:
    """Labels ``(B, T)`` and the tokens ``(K, 2)`` of masks → column ``(K,)`` of the state that wrote the first token of each one's answer:
    what is learned without a gap up to it."""
    columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    last_gap = torch.where(labels == IGNORE, columns, -1).cummax(1).values
    return last_gap[marks[:, 0], marks[:, 1]].clamp(min=0)


IMAGE_ID = 4
"""The placeholder in the contract's example."""


def owners_of(model: HeadModel, input_ids: Tensor, marks: Tensor, image_sizes: Tensor | None) -> Tensor:
    """For each token ``(K, 2)`` (row, column), the number in the batch of the last picture before it in its row. Raises
    `AlignmentError` for a token without one."""
    owners = pictures_before(model, input_ids, marks, image_sizes)
    if bool((owners < 0).any()):
        raise AlignmentError("a mask is asked for in a text without a picture before it")
    return owners
