"""How does vLLM keep an answer free of the ids that stand for a picture, as `generate` does?

A logits processor comes after every client's bias and after the log-probabilities were taken (``raw_logprobs``), so nobody can
lift the rule and the reported log-probabilities stay those of the model. It speaks to both of vLLM's model runners.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

from mllm.heads.codes.grammar import never_written
from mllm.models.configuration_mllm import MllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as RunnerV2Processor
except ImportError:  # a vLLM with one model runner
    RunnerV2Processor: Any = object


def never_ids(config: PreTrainedConfig) -> list[int]:
    """The ids that no text answer of a checkpoint holds. config: its `MllmConfig`; another one has none."""
    return never_written(config) if isinstance(config, MllmConfig) else []


class PlaceholderProcessor(LogitsProcessor, RunnerV2Processor):  # pyright: ignore[reportGeneralTypeIssues]
    """Forbids `never_ids` in every row of a batch, whatever the request."""

    def __init__(self, vllm_config: Any, *where: Any) -> None:
        """where: the device and whether memory is pinned, or the second runner's request state."""
        device = where[0] if isinstance(where[0], torch.device) else where[0].device
        self.never = torch.tensor(never_ids(vllm_config.model_config.hf_config), dtype=torch.long, device=device)

    def is_argmax_invariant(self) -> bool:
        """Greedy answers obey it too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing is kept of requests."""

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        """logits ``(R, V)`` of all rows of a step, changed in place."""
        return logits.index_fill_(1, self.never, -torch.inf)
