"""Which language models does vLLM not run on this machine, so that nobody waits for its engine to fail?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mllm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's CPU kernels take (0.26 to 0.32); with another the engine dies at the first request."""


def check_engine_heads(checkpoint: str, config: PretrainedConfig) -> None:
    """Raises `ConfigError` where no GPU is here and vLLM on a CPU has no attention for the language model's heads.

    Args:
        checkpoint: what an error begins with.
        config: the checkpoint's.
    """
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if not torch.cuda.is_available() and width not in CPU_HEADS:
        raise ConfigError(
            f"{checkpoint}: its language model has attention heads of {width}, and vLLM on a CPU takes "
            f"{', '.join(map(str, CPU_HEADS))}; run it on a GPU, or ask it with `mllm chat {checkpoint}` and `mllm eval run {checkpoint}`"
        )
