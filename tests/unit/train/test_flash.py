"""Is an installed attention kernel adopted only where it does what torch's own does?"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig

from mllm.train import flash
from mllm.train.flash import Heads, adopt, has_dropout, heads_of, kernel_of, release, tried
from mllm.varlen import segment_attention
from tests.integration.train_helpers import make_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class _Attention(nn.Module):
    head_dim, attention_dropout = 24, 0.0


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.decoder = nn.ModuleList([_Attention(), _Attention()]), _Attention()

    def get_decoder(self):
        return self.decoder


TEXT = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def registry(monkeypatch):
    """torch's own, in which implementations of ours can be registered; nothing stays active."""
    from torch.nn.attention import _registry

    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", dict(_registry._FLASH_ATTENTION_IMPLS))
    yield _registry
    release()


class _Handle:
    def __init__(self):
        self.removed = False

    def remove(self):
        self.removed = True


def test_a_models_heads_are_those_of_its_language_model_and_the_widths_of_the_rest():
    assert heads_of(_Model(), TEXT) == [Heads(16, 4, 2, packed=True), Heads(24, 4, 4, packed=False)]


def test_a_window_is_tried_where_the_model_slides_one():
    sliding = MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    packed = [kind for kind in heads_of(_Model(), sliding) if kind.packed]
    assert packed == [Heads(16, 4, 2, packed=True), Heads(16, 4, 2, packed=True, window=True)]


def test_a_trial_has_samples_without_tokens_as_packed_rows_have(monkeypatch):
    seen = []

    def attention(query, key, value, bounds, longest, *, causal, window):
        seen.append((bounds.diff().tolist(), longest, window))
        return query + key.sum() + value.sum()

    monkeypatch.setattr(flash, "segment_attention", attention)
    for window in (False, True):
        flash._outcome(Heads(8, 2, 2, packed=True, window=window), CPU)
    assert seen == [([130, 257, 61, 0, 0], 257, None), ([130, 257, 61, 0, 0], 257, 70)]


def test_dropout_of_scores_is_found():
    model = _Model()
    assert not has_dropout(model)
    model.tower[1].attention_dropout = 0.1
    assert has_dropout(model)


def test_what_is_not_installed_or_not_on_a_gpu_is_told():
    assert adopt(_Model(), TEXT, CPU) == (None, "attention runs by torch on the CPU")
    if any(flash._is_installed(module) for module in flash.PACKAGES.values()):
        pytest.skip("a FlashAttention package is installed")
    name, line = adopt(_Model(), TEXT, GPU)
    assert name is None and "torch's FlashAttention 2: no package of FlashAttention 3" in line


def test_a_kernel_is_adopted_when_it_is_right_and_released_again(monkeypatch, registry):
    handle = _Handle()
    registry.register_flash_attention_impl("FA3", register_fn=lambda: handle)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", _module("flash_attn_interface"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    outcomes = monkeypatch_outcomes(monkeypatch)
    assert adopt(_Model(), TEXT, GPU) == (
        "FA3",
        "attention runs by FlashAttention 3 (flash_attn_interface), tried against torch's own",
    )
    assert outcomes == [Heads(16, 4, 2, packed=True), Heads(24, 4, 4, packed=False)] * 2
    assert kernel_of("mllm_varlen") == "mllm_varlen (FA3: flash_attn_interface)"
    release()
    assert handle.removed and kernel_of("mllm_varlen") == "mllm_varlen"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    name, line = adopt(_Model(), TEXT, GPU)
    assert name is None and line.endswith("torch's FlashAttention 2: FA3 is not for compute capability 8")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raises", "RuntimeError: no such head"),
        ("differs", "with heads of 24 it differs from torch's own by 50.0%"),
        ("nan", "with heads of 24 it differs from torch's own by nan%"),
        ("register", "ImportError: libcudart"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_left_out_with_the_reason(monkeypatch, registry, fault, told):
    handle = _Handle()

    def register():
        if fault == "register":
            raise ImportError("libcudart")
        return handle

    monkeypatch.setitem(flash._REGISTER, "FA4", register)
    monkeypatch_outcomes(monkeypatch, fault)
    assert tried("FA4", heads_of(_Model(), TEXT), CPU) == told
    assert registry.current_flash_attention_impl() is None and (handle.removed or fault == "register")


def monkeypatch_outcomes(monkeypatch, fault=""):
    """Attention on the CPU in the kernel's place: what is compared, and what a fault in it does, is the same."""
    seen, real = [], flash._outcome

    def outcome(kind, device):
        from torch.nn.attention import current_flash_attention_impl

        seen.append(kind)
        found = real(kind, CPU)
        if current_flash_attention_impl() is not None and not kind.packed:
            if fault == "raises":
                raise RuntimeError("no such head")
            if fault:
                found[0] = found[0] * (0.5 if fault == "differs" else float("nan"))
        return found

    def per_segment(query, key, value, bounds, longest, *, causal, window):
        from mllm.train.attention import _per_sample

        options = {"scale": None, "causal": causal, "window": window, "softcap": None, "dropout": 0.0}
        rows = [t.transpose(0, 1)[None] for t in (query, key, value)]
        return _per_sample(*rows, bounds, **options)[0]

    monkeypatch.setattr(flash, "_outcome", outcome)
    monkeypatch.setattr(flash, "segment_attention", per_segment)
    return seen


def _module(name: str) -> types.ModuleType:
    from importlib.machinery import ModuleSpec

    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


def test_attention_auto_trains_by_torchs_own_on_a_cpu_and_says_so(tmp_path, capfd):
    import json

    from mllm.train import run_recipe

    recipe = make_recipe(
        tmp_path, stages=[{"name": "sft", "steps": 1, "attention": "auto", "dtype": "bfloat16", "packing": True}]
    )
    run_recipe(recipe)
    assert "sft: attention runs by torch on the CPU" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["sft"]["attention"] == "mllm_varlen"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a kernel for CUDA")
def test_torchs_own_kernel_is_its_own_measure():
    kind = Heads(64, 4, 2, packed=True)
    assert all(torch.equal(a, b) for a, b in zip(flash._outcome(kind, GPU), flash._outcome(kind, GPU)))
    assert segment_attention is flash.segment_attention
