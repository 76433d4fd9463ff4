"""Does a packed sample see itself only, and compute what it would compute alone?"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mllm.errors import UnavailableError
from mllm.train import attention

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi3": {"pad_token_id": 0},
}
LENGTHS = [[5, 9, 3], [11, 6]]
ROW = 19


def _model(family: str):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def _rows():
    generator = torch.Generator().manual_seed(1)
    samples = [[torch.randint(1, 97, (n,), generator=generator) for n in row] for row in LENGTHS]
    ids = torch.zeros(len(LENGTHS), ROW, dtype=torch.long)
    positions = torch.zeros(len(LENGTHS), ROW, dtype=torch.long)
    for r, row in enumerate(samples):
        start = 0
        for part in row:
            ids[r, start : start + len(part)] = part
            positions[r, start : start + len(part)] = torch.arange(len(part))
            start += len(part)
        positions[r, start:] = torch.arange(ROW - start)
    return samples, ids, positions


def _packed(model, ids, positions):
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model(input_ids=ids, position_ids=positions, use_cache=False, **_boundaries()).logits


def _boundaries():
    ends = torch.tensor([0, 5, 14, 17, 19, 30, 36, 38, 38], dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": ROW, "max_length_k": ROW}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_logits_and_gradients_equal_each_samples_own(family):
    samples, ids, positions = _rows()
    model = _model(family)
    expected, loss = [], 0
    for row in samples:
        for part in row:
            logits = model(input_ids=part[None], use_cache=False).logits[0]
            expected.append(logits.detach())
            loss = loss + logits.square().sum()
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = _packed(model, ids, positions)
    found, loss = [], 0
    for r, row in enumerate(LENGTHS):
        for part in logits[r, : sum(row)].split(row):
            found.append(part.detach())
            loss = loss + part.square().sum()
    loss.backward()
    for a, b in zip(found, expected):
        assert (a - b).abs().max() < 1e-5
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max() + 1e-5, name


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_changing_one_packed_sample_leaves_the_others_bit_equal(family):
    _, ids, positions = _rows()
    model = _model(family)
    before = _packed(model, ids, positions)
    changed = ids.clone()
    changed[0, 5:14] = (changed[0, 5:14] + 1) % 97
    after = _packed(model, changed, positions)
    same = torch.ones(2, ROW, dtype=torch.bool)
    same[0, 5:14] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


@pytest.mark.parametrize("trap", [{"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(2, ROW)}])
def test_the_known_leaks_of_sdpa_packing_are_real_and_not_ours(trap):
    """transformers detects packing only without mask and cache; with either, samples attend to their neighbours."""
    _, ids, positions = _rows()
    model = _model("llama")
    clean = _packed(model, ids, positions)
    ours = model(input_ids=ids, position_ids=positions, **trap, **_boundaries()).logits
    model.set_attn_implementation("sdpa")
    theirs = model(input_ids=ids, position_ids=positions, **trap).logits
    used = positions[0, 5:14]
    assert torch.allclose(ours[0, : sum(LENGTHS[0])], clean[0, : sum(LENGTHS[0])], atol=1e-6)
    assert (theirs[0, 5:14] - clean[0, 5:14]).abs().max() > 1e-3 and len(used)


def test_right_padded_rows_without_boundaries_equal_masked_sdpa_on_real_tokens():
    model = _model("qwen2")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 97, (2, 8), generator=generator)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    model.set_attn_implementation("sdpa")
    wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    attention.register()
    model.set_attn_implementation(attention.NAME)
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert (found - wanted)[mask.bool()].abs().max() < 1e-5


def test_the_longest_sample_is_rounded_up_to_few_lengths():
    assert [attention.bucket(n, 4096) for n in (3, 512, 600, 4000, 4096)] == [512, 512, 1024, 4096, 4096]
    assert attention.bucket(3, 8) == 8


def test_what_the_kernel_cannot_do_is_refused():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(UnavailableError, match="not an attention mask"):
        attention.varlen_attention(torch.nn.Module(), q, q, q, torch.ones(1, 1, 4, 4))
    with pytest.raises(UnavailableError, match="sinks"):
        attention.varlen_attention(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))
