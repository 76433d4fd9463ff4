"""Are the first encoders run once for a routing request and the answer that follows?"""

from __future__ import annotations

import pytest
import torch

from mllm.models.pipeline import EncoderBank
from mllm.serve.vllm.feature_memory import FeatureMemory
from tests.helpers import TINY_CLIP, TINY_TIMM


@pytest.fixture
def bank():
    torch.manual_seed(0)
    router = {"type": "constant", "experts": ["spatial"]}
    return EncoderBank({"semantic": dict(TINY_CLIP), "spatial": dict(TINY_TIMM)}, router, text_width=8).eval()


def batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "semantic": torch.randn(count, 3, 28, 28, generator=generator),
        "spatial": torch.randn(count, 3, 32, 32, generator=generator),
    }


@torch.no_grad()
def test_a_remembered_picture_has_the_same_features_and_is_not_run_again(bank):
    memory, pixels = FeatureMemory(bank), batch(3)
    first = memory.encode(pixels, [True, False, True])
    assert bank.num_encoded["semantic"] == 3 and len(memory) == 2
    order = [2, 1, 0]
    again = memory.encode({name: value[order] for name, value in pixels.items()}, [False] * 3)
    assert bank.num_encoded["semantic"] == 4
    torch.testing.assert_close(again["semantic"].tokens, first["semantic"].tokens[order])
    torch.testing.assert_close(first["semantic"].tokens, bank.encode_base(pixels)["semantic"].tokens)
    assert len(memory) == 0


@torch.no_grad()
def test_pictures_of_equal_sum_are_not_mistaken_for_one_another(bank):
    memory, pixels = FeatureMemory(bank), batch(1)
    memory.encode(pixels, [True])
    turned = {name: value.flip(-1) for name, value in pixels.items()}
    expected = bank.encode_base(turned)["semantic"].tokens
    torch.testing.assert_close(memory.encode(turned, [False])["semantic"].tokens, expected)


@torch.no_grad()
def test_only_the_newest_pictures_are_kept(bank):
    memory = FeatureMemory(bank, size=2)
    for seed in range(5):
        memory.encode(batch(1, seed), [True])
    assert len(memory) == 2
    bank.num_encoded.clear()
    memory.encode(batch(1, 4), [False])
    assert bank.num_encoded["semantic"] == 0
