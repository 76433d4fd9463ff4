"""What is trained? The multimodal model, or the model of a stage that trains something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    TrainableModel: TypeAlias = "MllmForConditionalGeneration | StageModel"


class StageConfig:
    """What the engine asks of a model's config, of one that has no language model."""

    def __init__(self, kind: str):
        self.model_type, self.layer_types = kind, None
        self.dtype: torch.dtype | None = None

    def get_text_config(self) -> StageConfig:
        return self


class StageModel(nn.Module):
    """A stage's own model, whose parameters belong to parts with names, as those of the multimodal one do. Its networks keep their own
    attention, and it has no vocabulary."""

    config: StageConfig

    def part_prefixes(self) -> dict[str, list[str]]:
        """Part → prefixes of its parameters' names, most specific part first."""
        raise NotImplementedError

    def named_parts(self) -> dict[str, list[tuple[str, nn.Module]]]:
        """Part → its modules by name."""
        raise NotImplementedError

    def part_of(self, parameter_name: str) -> str:
        """The part that a parameter belongs to."""
        raise NotImplementedError

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None

    def set_attn_implementation(self, _: Any) -> None:
        """The networks keep their own."""

    def compile_networks(self) -> None:
        """Compile them in place."""
        raise NotImplementedError

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute layers in the backward pass."""
        raise NotImplementedError
