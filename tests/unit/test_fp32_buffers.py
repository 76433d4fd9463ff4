"""Do moving averages stay fp32 in a model that is built in, moved to or loaded in another precision?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mllm.encoders.weights import default_dtype
from mllm.heads.running_norm import RunningNorm
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.visual_tokenizers.quantizers.codebook import Codebook, CodebookConfig
from tests.helpers import tiny_model


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with default_dtype(torch.bfloat16):
        return make()


WAYS: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]] = {
    "built": built,
    "moved": lambda make: make().to(torch.bfloat16),
    "from meta": lambda make: make().to("meta").to(torch.bfloat16).to_empty(device="cpu"),
    "put in place": lambda make: put_in_place(make()),
}


def put_in_place(module: nn.Module) -> nn.Module:
    for name, buffer in list(module.named_buffers()):
        setattr(module, name, buffer.to(torch.bfloat16) if buffer.is_floating_point() else buffer)
    return module


@pytest.mark.parametrize("way", list(WAYS))
def test_running_statistics_and_codebooks_are_fp32(way: str) -> None:
    norm = WAYS[way](lambda: RunningNorm(4))
    book = WAYS[way](lambda: Codebook(CodebookConfig(learn="ema"), 8, 4))
    for module in (norm, book):
        assert {b.dtype for b in module.buffers() if b.is_floating_point()} == {torch.float32}
    assert norm.batches.dtype == torch.int64 and norm(torch.randn(9, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_moving_to_a_precision_rounds_nothing() -> None:
    norm = RunningNorm(64)
    norm(torch.randn(50, 64))
    kept = norm.mean.clone()
    norm.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(norm.mean, kept)


def test_a_codebook_of_parameters_follows_the_dtype() -> None:
    assert Codebook(CodebookConfig(), 8, 4).to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_checkpoint_loaded_in_bfloat16_keeps_its_statistics(tmp_path: Path) -> None:
    head = {
        "type": "segmentation",
        "encoder": "semantic",
        "norm": "running",
        "decoder": {"type": "query", "width": 16, "depth": 1, "heads": 2},
    }
    model, _ = tiny_model(tmp_path / "tokenizer", heads={"marks": head})
    norm = next(m for m in model.modules() if isinstance(m, RunningNorm))
    norm(torch.randn(50, norm.mean.shape[0]))
    model.save_pretrained(tmp_path / "model")
    again = MllmForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    loaded = next(m for m in again.modules() if isinstance(m, RunningNorm))
    assert loaded.mean.dtype == loaded.variance.dtype == torch.float32
    torch.testing.assert_close(loaded.mean, norm.mean, rtol=1e-2, atol=1e-3)
