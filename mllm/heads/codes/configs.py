"""What does a recipe say of a head that draws?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mllm.errors import ConfigError
from mllm.heads.base import HeadConfig
from mllm.visual_tokenizers.base import VisualTokenizer


class CodeHeadConfig(HeadConfig):
    """What the config of every head that draws has."""

    text_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of drawn images that train without the text before them, which guidance needs."""
    code_noise: float = Field(default=0.0, ge=0, le=1)
    """Share of a drawn image's codes in whose place training reads others, drawn at random; what is to be told stays as it is. Where all
    codes before each one are given right, the next can be copied from them, and the words are hardly read: drawings then ignore what was
    asked for. 0.5 and more makes a model tell codes from words and pictures (word dropout, arXiv 1511.06349)."""
    changed_weight: float = Field(default=1.0, gt=0)
    """Weight in the loss of codes where a drawn picture differs from the one shown last before it, beside 1 for the others (those of a
    picture have mean 1). An edit of one thing changes a tenth of the codes; counted alike, they hardly teach (UniWorld weighs them by
    area, arXiv 2506.03147). Not for a vocabulary head, whose loss is the language model's."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Codebook → weight of its loss; 1 where it is not named."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """Ids: ``start``, ``end``, ``code`` (placeholder), ``null`` (stands for dropped text). Filled in when a model is built."""


class VocabularyHeadConfig(CodeHeadConfig):
    """Codes are ids of the language model's own vocabulary (ILLUME+, Show-o, TokenFlow's id space)."""

    type: Literal["vocabulary"] = "vocabulary"
    levels: list[dict[str, int]] = Field(default_factory=list)
    """Per block of codes: ids ``start``, ``end`` and ``first`` (of code 0). Filled in when a model is built."""

    @field_validator("changed_weight")
    @classmethod
    def _alike(cls, value: float) -> float:
        if value != 1:
            raise ValueError(
                f"{value}: a vocabulary head's codes all count alike, as words do; leave it out, or use a separate head"
            )
        return value


class SeparateHeadConfig(CodeHeadConfig):
    """An output layer per codebook, and the codes' vectors through an aligner as inputs (Janus)."""

    type: Literal["separate"] = "separate"
    inner: int | None = Field(default=None, ge=1)
    """Width between the head's two linear layers; default the language model's."""
    told_changes: bool = False
    """Whether inputs also say of each code that comes next if its cell changes: in training where a drawn picture differs from the one
    shown last before it, in an edit what its mask touches, all of a picture that is drawn from words alone. Where the mask is known, the
    codes need not find the place a second time."""


class DepthHeadConfig(CodeHeadConfig):
    """One step per position; a depth transformer per codebook writes its codes (VILA-U, DualToken)."""

    type: Literal["depth"] = "depth"
    width: int = Field(default=512, ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class NextScaleHeadConfig(CodeHeadConfig):
    """A whole scale per step (VAR, TokenFlow)."""

    type: Literal["next_scale"] = "next_scale"
    inner: int | None = Field(default=None, ge=1)


def check_weights(config: CodeHeadConfig, tokenizer: VisualTokenizer) -> None:
    """Raises `ConfigError` for a loss weight of a codebook that the tokenizer lacks."""
    for name in config.weights:
        if name not in tokenizer.codebooks:
            raise ConfigError(
                f"heads: a {config.type} head's weights: {tokenizer.name} has no codebook {name!r}; it has "
                f"{', '.join(tokenizer.codebooks)}"
            )
