"""Which heads of a checkpoint does a server answer with, and how is a request's answer found again in the engine?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.config import StrictModel
from mllm.heads.build import head_configs

KEY = "mllm_heads"
"""Under which a request's name stands in ``SamplingParams.extra_args``."""
READER = "mllm.serve.vllm.head_reader:HeadReader"
"""For vLLM's ``logits_processors``. It knows vLLM's first model runner only."""
WORKER = "mllm.serve.http.stats.VisualStatistics"
"""For vLLM's ``worker_extension_cls``: answers ``collective_rpc("head_answers", args=(request,))``."""
HEADS_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""What an engine with the reader needs before it starts: the second runner gives a processor no request's own tokens."""


class ServedHeads(StrictModel):
    """What the server must know of the heads that answer beside the text."""

    mark: str | None = None
    """Token of the answer that stands for a mask; None: no masks."""
    example: str | None = None
    """What the prompt says behind a picture that comes with a mask; None: pictures come without."""
    probability: bool = False
    """Whether an answer may name a class whose probability is known."""


def served_heads(heads: Mapping[str, Any] | None) -> ServedHeads | None:
    """Those of a config's ``heads`` whose answers `mllm serve` gives; None: there is none."""
    configs = list(head_configs(heads).values())
    marks = next((config for config in configs if config.type == "segmentation"), None)
    probability = any(config.type == "probability" for config in configs)
    if marks is None:
        return ServedHeads(probability=True) if probability else None
    example = None if marks.examples is None else marks.examples.token
    return ServedHeads(mark=marks.token, example=example, probability=probability)
