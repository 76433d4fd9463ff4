"""Is a language model asked which tokens it sees before it is trained, and is what it must not see found?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mllm.errors import ConfigError
from mllm.models.configuration_mllm import MllmConfig, language_model_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.train.prepare import _choose_attention

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
KV = {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0}
HYBRID = {**KV, "layer_types": ["conv", "full_attention"]}
CPU = torch.device("cpu")


def small(kind: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return MllmForConditionalGeneration(MllmConfig(text_config=language_model_config({"model_type": kind, **sizes})))


def chosen(model: Any, *, packing: bool = True, attention: str | None = None) -> str:
    stage: Any = SimpleNamespace(name="sft", packing=packing, attention=attention)
    return _choose_attention(model, model.config.get_text_config(), stage, CPU)


def test_where_boundaries_do_not_reach_the_attention_another_one_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """StableLM's layers are given no more than a mask; Llama's all that travels beside it."""
    model = small("stablelm", **KV).train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert chosen(model) == "sdpa" == model.config.get_text_config()._attn_implementation
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert chosen(small("llama", **KV)) == "mllm_varlen"
    with pytest.raises(ConfigError, match=r"sft\.packing: with attention mllm_varlen, packed samples of stablelm see"):
        chosen(model, attention="mllm_varlen")


@pytest.mark.parametrize(("kind", "sizes"), [("bloom", SIZES), ("falcon", SIZES), ("lfm2", HYBRID)])
def test_samples_that_no_attention_keeps_apart_are_not_packed(kind: str, sizes: dict[str, Any]) -> None:
    model = small(kind, **sizes)
    for attention in (None, "sdpa", "eager"):
        with pytest.raises(ConfigError, match=r"stages\.sft\.packing: .*group_by_length"):
            chosen(model, attention=attention)
        assert chosen(model, packing=False, attention=attention) == (attention or "sdpa")


def test_what_sees_the_answer_is_refused() -> None:
    model = small("bert-generation", **SIZES, bos_token_id=1, eos_token_id=2)
    for packing in (True, False):
        with pytest.raises(
            ConfigError, match=r"stages\.sft\.attention: with .*, a token of bert-generation sees those behind it"
        ):
            chosen(model, packing=packing)


def test_bfloat16_is_asked_too() -> None:
    model = small("gemma3_text", **KV, head_dim=16, sliding_window=8).to(torch.bfloat16)
    assert chosen(model) == "mllm_varlen"
    with pytest.raises(ConfigError, match="packed samples of falcon"):
        chosen(small("falcon", **SIZES).to(torch.bfloat16), attention="sdpa")
