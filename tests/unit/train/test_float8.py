"""Does float8 leave the learned weights and their names alone, change the products only a little, and refuse what it does not fit?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mllm.errors import ConfigError
from mllm.recipe import StageSpec
from mllm.train.engine.base import choose_engine
from mllm.train.float8 import use_float8
from tests.helpers import tiny_model

sys.path.append(str(Path(sys.prefix) / "float8"))  # see Makefile
CPU = torch.device("cpu")


def stage(**changes) -> StageSpec:
    settings = {"name": "sft", "learn": {"language_model": 1e-4}, "data": "x.json", "steps": 1, "float8": "tensorwise"}
    return StageSpec.model_validate({**settings, **changes})


def test_products_are_rounded_and_the_weights_stay_the_same_objects(tmp_path):
    torchao = pytest.importorskip("torchao.float8.float8_linear")
    model = tiny_model(tmp_path)[0].bfloat16()
    decoder = model.get_decoder()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    ids = torch.arange(32)[None] % 50
    plain = decoder(input_ids=ids).last_hidden_state.detach().float()
    restore = use_float8(model, stage(), CPU, zero_stage=0)
    swapped = [m for m in decoder.modules() if isinstance(m, torchao.Float8Linear)]
    assert len(swapped) == 7 * len(decoder.layers)
    assert len(swapped) == sum(isinstance(m, torchao.Float8Linear) for m in model.modules())  # nowhere else
    assert list(model.state_dict()) == keys
    output = decoder(input_ids=ids).last_hidden_state.float()
    error = float((output.detach() - plain).norm() / plain.norm())
    assert 1e-4 < error < 0.1  # float8 rounds to 1/16, sums average it out; exactly 0 would mean that nothing happened
    output.pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.layers.parameters())
    restore()
    assert not any(isinstance(m, torchao.Float8Linear) for m in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert torch.equal(decoder(input_ids=ids).last_hidden_state.float(), plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float32"}, "bf16"),
        ({"engine": "zero3"}, "zero3"),
        ({"engine": "fsdp2"}, "fsdp2 gathers weights layer by layer"),
        ({"learn": {"language_model": {"lr": 1e-4, "lora": {"r": 4}}}}, "adapters"),
    ],
)
def test_stages_that_it_does_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        use_float8(
            torch.nn.Linear(16, 16), stage(**changes), CPU, zero_stage=choose_engine(stage(**changes)).zero_stage
        )


def test_a_frozen_language_model_is_refused(tmp_path):
    pytest.importorskip("torchao.float8")
    model = tiny_model(tmp_path)[0].bfloat16().requires_grad_(False)
    with pytest.raises(ConfigError, match="no language model learns"):
        use_float8(model, stage(learn={"connector": 1e-4}), CPU, zero_stage=0)
