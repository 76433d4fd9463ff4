"""Is a language model that vLLM cannot run here told before its engine is started, by every door?"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from mllm.errors import ConfigError
from mllm.eval.generators.vllm import VLLMGenerator
from mllm.models.engine_limits import check_engine_heads
from mllm.serve.traces import open_vllm
from tests.helpers import tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM takes any width")


def test_heads_that_a_cpu_engine_has_no_kernel_for_are_named(tmp_path):
    model, processor = tiny_model(
        tmp_path / "parts",
        language_model={
            "config": LlamaConfig(
                vocab_size=320, hidden_size=48, num_attention_heads=2, num_hidden_layers=1
            ).to_diff_dict()
            | {"model_type": "llama"},
            "tokenizer": str(tmp_path / "parts"),
        },
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for door in (open_vllm, VLLMGenerator):
        with pytest.raises(ConfigError, match="attention heads of 24, and vLLM on a CPU takes 32, 64"):
            door(str(tmp_path / "model"))
    check_engine_heads("x", LlamaConfig(hidden_size=64, num_attention_heads=2))
    assert AutoConfig.from_pretrained(tmp_path / "model").get_text_config().hidden_size == 48
