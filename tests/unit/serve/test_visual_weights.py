"""Do an encoder's own low-rank weights reach vLLM's model, and those of an adapter not?"""

from __future__ import annotations

import pytest
import torch
from torch import nn


def test_an_encoders_own_low_rank_weights_are_loaded_and_an_adapters_are_left(monkeypatch):
    pytest.importorskip("vllm")
    from mllm.serve.vllm import model as served

    monkeypatch.setattr(served, "published_renamings", lambda _: [])
    joint = nn.Module()  # as SN-Netv2's joining layers name them
    joint.lora_B = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    own = nn.Module()
    own.vision_tower = nn.ModuleDict({"joint": joint})
    weights = [
        ("model.vision_tower.joint.lora_B", torch.ones(2, 3)),
        ("base_model.model.model.vision_tower.joint.q_proj.lora_A.weight", torch.ones(1)),
        ("lm_head.weight", torch.ones(1)),
    ]
    loaded: set[str] = set()
    rest = list(served.MllmForConditionalGeneration._load_visual(own, iter(weights), loaded))
    assert loaded == {"vision_tower.joint.lora_B"} and bool((joint.lora_B == 1).all())
    assert [name for name, _ in rest] == ["lm_head.weight"]
