"""What is a head here, and what do a model's heads do in one call?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mllm.config import StrictModel
from mllm.errors import ConfigError
from mllm.processing.layout import LayoutRules
from mllm.types import EncoderInfo, VisionFeatures
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.sequence import ImageGrammar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TARGET = "target_"
"""Every argument of ``model(…)`` that teaches a head begins with it."""


class HeadConfig(StrictModel):
    """What every head's config has."""

    type: str
    tokens: dict[str, int] = {}
    """Role → id of the tokens that the head added to the vocabulary (`Head.tokens`). Filled in when a model is built."""


@dataclass(frozen=True)
class HeadParts:
    """The parts of a model that its heads stand on. width: L; encoders: their sizes by name; tokenizer: the visual tokenizer that the
    model draws with (perhaps on the meta device, for its sizes), None where it has none."""

    width: int
    encoders: Mapping[str, EncoderInfo] = field(default_factory=dict)
    tokenizer: VisualTokenizer | None = None
    tokenize: Callable[[str], list[int]] | None = None
    """Text → the language model's ids; None before there is a text tokenizer."""
    layers: int = 0
    """Of the language model."""
    rules: LayoutRules | None = None
    """How visuals are looked at and lie in the sequence; None for a model that sees nothing."""

    def drawn_with(self, head: str) -> VisualTokenizer:
        """The visual tokenizer of a head that draws. head: its type, for the message. Raises `ConfigError` where the model has none."""
        if self.tokenizer is None:
            raise ConfigError(f"a {head} head draws, and the model has no visual_tokenizer to draw with")
        return self.tokenizer


@dataclass
class Step:
    """One call of the model, before it runs. Heads may change it (`Head.lay`).

    input_ids, labels ``(B, T)``; attention_mask, position_ids: as transformers has them; num_items: supervised tokens that the
    loss is divided by (None: those of this batch); num_targets: head → what the whole optimizer step teaches it (`Head.count`);
    own_targets: what this call does of that; head: whose loss is asked for; inputs: more arguments for the model; laid: head → what
    its `lay` gave; pixels: encoder → pixels of the pictures that the batch holds.
    """

    input_ids: Tensor | None
    labels: Tensor | None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    num_items: Any = None
    num_targets: Mapping[str, float] | None = None
    own_targets: dict[str, Any] = field(default_factory=dict)
    head: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    laid: dict[str, Any] = field(default_factory=dict)
    pixels: Mapping[str, Tensor] = field(default_factory=dict)

    def share(self) -> Any:
        """This call's part of the optimizer step: what the present head's mean over the call counts with, so that several processes or
        micro-batches weigh as one with all of it does. By what teaches the head, as `Head.count` says, where the whole step's is
        known; else by supervised tokens."""
        whole = (self.num_targets or {}).get(self.head)
        if whole:
            return self.own_targets[self.head] / whole
        if self.num_items is None or self.labels is None:
            return 1.0
        return (self.labels[:, 1:] != -100).sum().float() / self.num_items


@dataclass
class Reading:
    """What heads read of a call. hidden ``(B, T, L)``: last hidden states, after the final norm; features: those of the encoders that
    heads name (`Head.reads`), of all views in their order; hidden_states: those before the first layer and after each, ``(B, T, L)``,
    where a head asked for ``output_hidden_states`` (the last ones normed)."""

    hidden: Tensor
    features: Mapping[str, VisionFeatures] = field(default_factory=dict)
    hidden_states: Sequence[Tensor] | None = None


@dataclass
class HeadLoss:
    """total: what is added to the model's loss; parts: name → value to report, detached."""

    total: Tensor
    parts: dict[str, Tensor]


class HeadModel(Protocol):
    """What a head may use of the model it belongs to."""

    heads: Any
    lm_head: Any
    training: bool

    @property
    def config(self) -> PreTrainedConfig:
        """The whole model's."""
        ...

    @property
    def model(self) -> Any:
        """Encoders, router, connector and decoder, without the language-model head."""
        ...

    def token_loss(self, hidden: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
        """Cross-entropy of the language model's own head, as it trains on words."""
        ...

    # Where one of its heads draws:

    @property
    def visual_head(self) -> Any: ...

    @property
    def visual_config(self) -> Any: ...

    @property
    def image_tokenizer(self) -> VisualTokenizer: ...

    def is_visual(self, input_ids: Tensor) -> Tensor: ...


class MultimodalModel(HeadModel, Protocol):
    """`MllmForConditionalGeneration` as its own parts see it: what routing, generation and drawing use of the class that holds them."""

    last_routing: Any
    generation_config: Any

    @property
    def name_or_path(self) -> str | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def grammar(self) -> ImageGrammar: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate_text(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_decoder(self) -> nn.Module: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...


class Head(nn.Module):
    """One kind of answer besides text: which hidden states it reads, what it is taught with, its losses and its output."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[HeadConfig]] = HeadConfig
    config: HeadConfig
    targets: ClassVar[tuple[str, ...]] = ()
    """Arguments of ``model(…)`` that hold what the head should answer; a batch without the first of them teaches it nothing. None: the
    words themselves teach it."""
    draws: ClassVar[bool] = False
    """Whether it writes codes of the model's visual tokenizer. A model has at most one such head."""
    has_weights: ClassVar[bool] = True
    """False: a part of the language model does its work, and nothing of its own learns."""

    reads_video: ClassVar[bool] = False
    """Whether it may stand in a model that takes video."""
    special_tokens: ClassVar[bool] = True
    """Whether its tokens are left out of decoded answers."""
    zero3: ClassVar[bool] = False
    """Whether `losses` is all that it does in a step, and runs nothing but its own modules: then ZeRO-3 may spread its weights
    (`forward`)."""
    without_gradient: ClassVar[tuple[str, ...]] = ()
    """Parts of its parameters' names that no loss reaches, on purpose: weights that are kept for the layout of a published file."""

    def __init__(self, config: HeadConfig, parts: HeadParts):
        super().__init__()
        self.config, self.width = config, parts.width
        self.reported: dict[str, Tensor] = {}
        """`HeadLoss.parts` of the last `forward`."""

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        """The smallest sensible (config, parts); the contract tests build it."""
        raise NotImplementedError

    def example(self, parts: HeadParts, batch: int) -> tuple[Step, dict[str, Tensor]]:
        """A step of ``batch`` samples whose text fits the config's tokens, and their targets; the contract tests run it."""
        raise NotImplementedError

    @classmethod
    def tokens(cls, config: HeadConfig, parts: HeadParts) -> list[str]:
        """Tokens that the vocabulary needs for this head, in the order in which they get ids."""
        return []

    @classmethod
    def resolve(cls, config: HeadConfig, parts: HeadParts, id_of: Callable[[str], int], *, null: int) -> Any:
        """``config`` with the ids of its tokens. id_of: text of a token → id; null: the id that stands for text left out.
        Raises `ConfigError` for a config that does not fit the parts."""
        return config

    @classmethod
    def reads(cls, config: HeadConfig) -> tuple[str, ...]:
        """Names of the encoders whose features it reads beside the hidden states."""
        return ()

    def load_pretrained(self) -> None:
        """Read published weights, where the config names some. Nothing is read before."""

    def count(self, inputs: Mapping[str, Any]) -> float | None:
        """How many things a batch teaches it, that its mean loss is over. Processes and micro-batches weigh by it in a step, a
        batch without any weighs nothing. None: not known before the model runs; they weigh by supervised tokens."""
        given = inputs.get(self.targets[0]) if self.targets else None
        return None if not self.targets else 0 if given is None else len(given)

    def lay(self, model: HeadModel, step: Step, targets: Mapping[str, Tensor]) -> Any:
        """Take the batch's targets, by their names in `Head.targets`, and put into ``step`` what the model needs before it runs.
        Returns what `losses` needs, None where there is nothing to learn. Raises `AlignmentError` for targets that do not fit the text."""
        return dict(targets)

    def losses(self, model: HeadModel, step: Step, laid: Any, reading: Reading) -> HeadLoss:
        """The loss on what `lay` gave: a mean over what `count` counts. Only asked where there are targets and words to learn."""
        raise NotImplementedError

    def idle(self) -> Tensor | float:
        """Zero that reaches every learning parameter: what a batch without targets adds in training, so that all ranks reduce
        the same gradients."""
        return 0.0 * sum(p.float().sum() for p in self.parameters() if p.requires_grad)

    def forward(self, hidden: Tensor, *, model: HeadModel, step: Step, laid: Any, reading: Reading) -> Tensor:
        """What the head adds to the loss where ZeRO-3 spreads its weights: `losses`, or `idle` where ``laid`` is None.

        One call of one module in every step of every process, so that all gather the same weights at the same time, whatever the head
        does with them. hidden: ``reading.hidden``; by its gradient DeepSpeed learns that the head's are made.
        """
        self.reported = {}
        reached = 0.0 * hidden[:1, :1].float().sum()
        if laid is None:
            return self.idle() + reached
        found = self.losses(model, step, laid, replace(reading, hidden=hidden))
        self.reported = found.parts
        return found.total + reached


def lay_targets(model: HeadModel, step: Step) -> None:
    """Take the targets out of ``step.inputs`` and let each head lay its own. Raises `ConfigError` for targets that no head of this
    model learns from."""
    if step.num_targets is not None:
        taught = {"input_ids": step.input_ids, "labels": step.labels, **step.inputs}
        step.own_targets = {name: model.heads[name].count(taught) for name in step.num_targets}
    given = {key: step.inputs.pop(key) for key in list(step.inputs) if key.startswith(TARGET)}
    given = {key: value for key, value in given.items() if value is not None}
    for name, head in model.heads.items():
        own = {key: given.pop(key) for key in head.targets if key in given}
        first = own.get(head.targets[0]) if head.targets else None
        if first is not None and len(first):
            if step.input_ids is None:
                raise ConfigError(
                    f"{head.targets[0]}: input_ids are missing, and head {name!r} finds its places by them"
                )
            step.laid[name] = head.lay(model, step, own)
        elif not head.targets and step.labels is not None and step.input_ids is not None:
            step.laid[name] = head.lay(model, step, {})
    for key, value in given.items():
        if len(value):
            raise ConfigError(
                f"{key}: no head of this model learns from it; its heads: {', '.join(model.heads) or 'none'}"
            )


def heads_of(model: nn.Module) -> dict[str, Head]:
    """A model's heads by name; none of a stage's model of another kind, whatever it calls heads."""
    heads = getattr(model, "heads", None)
    named = heads.items() if isinstance(heads, nn.ModuleDict) else ()
    return {name: head for name, head in named if isinstance(head, Head)}


def count_targets(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Head → how much these batches' inputs teach it, of the heads that know it before they run (`Head.count`)."""
    counts: dict[str, float] = {}
    for name, head in heads_of(model).items():
        own = [number for inputs in batches if (number := head.count(inputs)) is not None]
        if len(own) == len(batches):
            counts[name] = float(sum(own))
    return counts


def head_losses(model: HeadModel, step: Step, reading: Reading) -> tuple[Tensor | float, dict[str, Tensor] | None]:
    """What the heads add to the loss, and ``<head>/<part>`` → value to report (None where nothing was to be answered)."""
    total: Tensor | float = 0.0
    report: dict[str, Tensor] = {}
    spread = any(hasattr(parameter, "ds_id") for parameter in model.lm_head.parameters())  # by ZeRO-3
    for name, head in model.heads.items():
        if spread:
            step.head, hidden = name, reading.hidden
            if torch.is_grad_enabled() and not hidden.requires_grad:  # the heads learn alone
                hidden = hidden.detach().requires_grad_()
            total = total + head(hidden, model=model, step=step, laid=step.laid.get(name), reading=reading)
            report |= {f"{name}/{part}": value for part, value in head.reported.items()}
        elif step.laid.get(name) is not None:
            step.head = name
            found = head.losses(model, step, step.laid[name], reading)
            total = total + found.total
            report |= {f"{name}/{part}": value for part, value in found.parts.items()}
        elif model.training and head.has_weights:
            total = total + head.idle()
    return total, report or None
