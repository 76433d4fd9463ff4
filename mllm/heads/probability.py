"""How sure is the model of the class that its answer names (FakeReasoning, arXiv 2503.21210)?

The answer holds a phrase and after it a class word ("This image is" + "fake" or "real"). The language model's own logits of these words,
at the place where the word stands, are the classes' scores: the head has no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from mllm.errors import ConfigError
from mllm.heads import HEADS
from mllm.heads.answers import answer
from mllm.heads.base import Head, HeadConfig, HeadLoss, HeadParts, MultimodalModel, Reading, Step
from mllm.processing.protocol import Processor

IGNORE = -100


class ProbabilityHeadConfig(HeadConfig):
    """Probabilities of classes that the answer names in words."""

    type: Literal["probability"] = "probability"
    phrase: str = Field(min_length=1)
    """What stands before the class word in every answer."""
    words: list[str] = Field(min_length=2)
    """The classes' words; each must begin with a token of its own."""
    temperature: float = Field(default=10.0, gt=0)
    """The scores are divided by it in the loss (FakeReasoning's 10)."""
    calibration: float = Field(default=1.0, gt=0)
    """The scores are divided by it when a probability is given: what `calibrate` finds on a validation split."""
    weight: float = Field(default=1.0, ge=0)
    phrase_ids: list[int] = Field(default_factory=list)
    word_ids: list[int] = Field(default_factory=list)
    """Ids of the phrase's last tokens and of the words' first ones. Filled in when a model is built."""

    @field_validator("words")
    @classmethod
    def _differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"words must differ, got {value}")
        return value


@dataclass
class ClassPlaces:
    """rows, columns ``(K,)``: hidden states that predict a class word; classes ``(K,)``: which."""

    rows: Tensor
    columns: Tensor
    classes: Tensor


@HEADS.register("probability")
class ProbabilityHead(Head):
    """The classes' own logits at the place of the class word, as a loss and as a probability."""

    Config = ProbabilityHeadConfig
    config: ProbabilityHeadConfig
    has_weights = False
    zero3 = True

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        config = {"type": cls.name, "phrase": "a b", "words": ["c", "d"]}
        return config, HeadParts(32, tokenize=lambda text: [5 + "abcd".index(letter) for letter in text.split()])

    def example(self, parts: HeadParts, batch: int) -> tuple[Step, dict[str, Tensor]]:
        ids = torch.tensor([1, *self.config.phrase_ids, self.config.word_ids[0], 3]).repeat(batch, 1)
        return Step(ids, ids.clone()), {}

    @classmethod
    def resolve(cls, config: ProbabilityHeadConfig, parts: HeadParts, id_of: Callable[[str], int], *, null: int) -> Any:
        if parts.tokenize is None:
            return config
        phrase, words = class_tokens(parts.tokenize, config.phrase, config.words)
        return config.model_copy(update={"phrase_ids": phrase, "word_ids": words})

    def lay(self, model: MultimodalModel, step: Step, targets: Mapping[str, Tensor]) -> ClassPlaces | None:
        assert step.labels is not None and step.input_ids is not None
        return self.places(step.input_ids, step.labels)

    def count(self, inputs: Mapping[str, Any]) -> float:
        found = self.places(inputs["input_ids"], inputs["labels"])
        return 0 if found is None else len(found.rows)

    def places(self, input_ids: Tensor, labels: Tensor) -> ClassPlaces | None:
        """Where ids ``(B, T)`` hold the phrase and then a class word that labels ``(B, T)`` teach; None where nowhere."""
        length, width = len(self.config.phrase_ids), input_ids.shape[1]
        if not length or width <= length:
            return None
        phrase = input_ids.new_tensor(self.config.phrase_ids)
        follows = (input_ids.unfold(1, length, 1)[:, :-1] == phrase).all(-1)
        next_ = labels[:, length:]
        words = (next_[..., None] == labels.new_tensor(self.config.word_ids)) & follows[..., None]
        rows, columns, classes = words.nonzero(as_tuple=True)
        return ClassPlaces(rows, columns + length - 1, classes) if len(rows) else None

    def scores(self, model: MultimodalModel, hidden: Tensor, places: ClassPlaces) -> Tensor:
        """Logits ``(K, classes)`` fp32 at the places."""
        logits = model.compute_logits(hidden[places.rows, places.columns])
        return logits[:, self.config.word_ids].float()

    def losses(self, model: MultimodalModel, step: Step, laid: ClassPlaces, reading: Reading) -> HeadLoss:
        scores = self.scores(model, reading.hidden, laid)
        loss = F.cross_entropy(scores / self.config.temperature, laid.classes)
        right = (scores.argmax(1) == laid.classes).float().mean()
        return HeadLoss(step.share() * self.config.weight * loss, {"class": loss.detach(), "right": right.detach()})

    def forward(self, hidden: Tensor, *, model: MultimodalModel, step: Step, laid: Any, reading: Reading) -> Tensor:
        if laid is None:  # the language model's own output layer runs on every process or on none
            self.reported = {}
            return 0.0 * model.compute_logits(hidden[:1, :1]).float().sum()
        return super().forward(hidden, model=model, step=step, laid=laid, reading=reading)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Logits ``(K, classes)`` → calibrated probabilities."""
        return (scores / self.config.calibration).softmax(-1)


@dataclass
class Probability:
    """An answer and how sure the model is of the class it names. probabilities: class word → probability; None where the answer does not
    hold the phrase; scores ``(classes,)``: the logits behind them, for `calibrate`."""

    text: str
    probabilities: dict[str, float] | None
    scores: Tensor | None


class ProbabilityMixin:
    """The judging side of `MllmForConditionalGeneration`; means something when one of its heads is a probability head."""

    config: PreTrainedConfig
    heads: Any

    @torch.no_grad()
    def probability(self: MultimodalModel, images: Any, question: str, *, processor: Processor, **options: Any) -> Any:
        """Ask a question whose answer names a class.

        Args:
            images: a picture or a list (paths, PIL, arrays, bytes).
            question: one for all.
            processor: the model's own.
            options: as ``generate`` takes them.

        Returns:
            `Probability`, a list of them for a list of pictures.

        Raises:
            ConfigError: the model has no such head.
        """
        head = next((head for head in self.heads.values() if isinstance(head, ProbabilityHead)), None)
        if head is None:
            raise ConfigError("this model names no probabilities: none of its heads is of type probability")
        alone = not isinstance(images, (list, tuple))
        pictures = [images] if alone else list(images)
        answered = answer(self, processor, pictures, [question] * len(pictures), options)
        ids = answered.ids
        found: list[Probability] = []
        for row, text in enumerate(answered.texts):
            end, ends = phrase_end(ids[row : row + 1, answered.start :], head.config.phrase_ids)
            if not bool(ends):
                found.append(Probability(text, None, None))
                continue
            place = ClassPlaces(ids.new_tensor([row]), end + answered.start - 1, ids.new_tensor([0]))
            scores = head.scores(self, answered.hidden, place)
            shares = head.probabilities(scores)[0].tolist()
            found.append(Probability(text, dict(zip(head.config.words, shares)), scores[0]))
        return found[0] if alone else found


def class_tokens(
    tokenize: Callable[[str], list[int]], phrase: str, words: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Ids of the phrase and of each word's first token, as they are in one text. The phrase's first token is left out where there are
    more than two: it depends on what stands before. Raises `ConfigError` for words that begin alike."""
    texts = [tokenize(f"{phrase} {word}") for word in words]
    shared = 0
    while all(len(text) > shared and text[shared] == texts[0][shared] for text in texts):
        shared += 1
    firsts = [text[shared] if len(text) > shared else -1 for text in texts]
    if shared == 0 or -1 in firsts or len(set(firsts)) < len(firsts):
        raise ConfigError(
            f"heads: after {phrase!r} the words {', '.join(words)} do not each begin with a token of their own in this tokenizer "
            f"({firsts}); choose other words"
        )
    return texts[0][1 if shared > 2 else 0 : shared], firsts


def phrase_end(ids: Tensor, phrase: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the token after the first occurrence of ``phrase`` stands in each row of ids ``(B, T)``.

    Returns positions ``(B,)`` (0 where there is none) and ``found`` ``(B,)`` bool; a phrase that closes the row is not
    found, since nothing follows it.
    """
    length = len(phrase)
    if length == 0:
        raise ValueError("the phrase is empty")
    if ids.shape[1] <= length:
        return ids.new_zeros(ids.shape[0]), ids.new_zeros(ids.shape[0], dtype=torch.bool)
    windows = ids.unfold(1, length, 1)[:, :-1]
    match = (windows == ids.new_tensor(list(phrase))).all(dim=-1)
    found = match.any(dim=1)
    return torch.where(found, match.int().argmax(dim=1) + length, 0), found


def class_word_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ids: Tensor,
    phrase: Sequence[int],
    class_ids: Sequence[int],
    temperature: float = 10.0,
) -> Tensor:
    """The loss as FakeReasoning publishes it, from all logits: cross-entropy over a few words where the answer names the class.

    logits ``(B, T, V)``; labels ``(B,)``: index into ``class_ids``; ids ``(B, T)``: the token that ``logits[:, t]``
    predicts, from the shifted targets, or ``logits.argmax(-1)`` as published (no signal until the model has learned the
    phrase); phrase: token ids that stand before the class word. Samples without the phrase are left out; a scalar, 0
    with gradient when there are none.
    """
    position, found = phrase_end(ids, phrase)
    picked = logits[torch.arange(len(logits), device=logits.device), position]
    scores = picked[:, list(class_ids)].float() / temperature
    losses = F.cross_entropy(scores, labels, reduction="none")
    return (losses * found).sum() / (found.sum() + 1e-6)


# What a probability is worth -----------------------------------------------------------------------------------------------


def calibrate(scores: Tensor, classes: Tensor) -> float:
    """The temperature under which scores ``(N, C)`` say best how often classes ``(N,)`` are right: least cross-entropy on a validation
    split (Guo et al., arXiv 1706.04599). Raises `ConfigError` without samples."""
    if not len(scores):
        raise ConfigError("calibrate: no validation samples")
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scores.detach().double() / log.exp(), classes)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log.detach().clamp(-7, 7).exp())


def calibration_error(probabilities: Tensor, classes: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of ``(N, C)``: how far the most likely class's probability is from how often it is right, in equal
    bins, weighted by their samples."""
    confidence, guess = probabilities.double().max(1)
    right = (guess == classes).double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, number, torch.ones_like(right))
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, number, confidence - right)
    return float(gap.abs().sum() / count.sum().clamp(min=1))


def best_threshold(probability: Tensor, wanted: Tensor) -> float:
    """The probability ``(N,)`` from which "yes" is right most often on a validation split, wanted ``(N,)`` bool; of equals the middle
    of the widest gap."""
    values = probability.double().unique()
    edges = torch.cat([values.new_tensor([0.0]), values, values.new_tensor([1.0])])
    middles = (edges[1:] + edges[:-1]) / 2
    right = ((probability.double()[None] >= middles[:, None]) == wanted.bool()[None]).double().mean(1)
    best = (right == right.max()).nonzero().flatten()
    return float(middles[max(best.tolist(), key=lambda k: float(edges[k + 1] - edges[k]))])
