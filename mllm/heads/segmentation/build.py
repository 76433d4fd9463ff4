"""What must a model's processor know of the masks that it answers with?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mllm.errors import ConfigError
from mllm.heads import HEADS
from mllm.heads.base import HeadParts
from mllm.heads.build import head_configs
from mllm.processing.segments import ExampleSpec, SegmentSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def segmentation_heads(heads: Any) -> list[str]:
    """Names of the heads that answer with masks."""
    configs = head_configs(heads)
    if not configs:
        return []  # most models: they wait for none of the libraries of decoders
    from mllm.heads.segmentation.head import SegmentationHead

    return [name for name, config in configs.items() if issubclass(HEADS.get(config.type), SegmentationHead)]


def segment_spec(config: PreTrainedConfig) -> SegmentSpec | None:
    """What the processor of an `MllmConfig` lays masks by; None for a model that marks nothing. Raises `ConfigError` for a model whose
    masks would have no one place on what the encoder sees."""
    names = segmentation_heads(config.heads)
    if not names:
        return None
    if len(names) > 1:
        raise ConfigError(f"model.heads: {names[0]} and {names[1]} both answer with masks; keep one")
    head, infos = head_configs(config.heads)[names[0]], config.encoder_infos()
    if config.layout_rules().needs_size:
        raise ConfigError(
            f"model.heads.{names[0]}: masks are read from one view of the whole picture; leave model.views out (it is {config.views})"
        )
    if head.encoder in ((config.router or {}).get("experts") or ()):
        raise ConfigError(
            f"model.heads.{names[0]}.encoder: {head.encoder!r} is an expert, which does not see every picture"
        )
    with torch.device("meta"):  # raises for a decoder that does not fit
        HEADS.get(head.type)(head, HeadParts(config.get_text_config().hidden_size, infos))
    image = infos[head.encoder].image
    return SegmentSpec(
        token=head.token,
        token_id=head.tokens["mark"],
        image=image,
        size=(image.height, image.width),
        question=head.question,
        example=None
        if head.examples is None
        else ExampleSpec(token=head.examples.token, token_id=head.tokens["example"], question=head.examples.question),
    )
