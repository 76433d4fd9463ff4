"""Is AdamW with its state in fewer bytes the one with float32 state, to the bit or on average?"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

from mllm.config import validate
from mllm.errors import ConfigError
from mllm.recipe import OptimizerSpec
from mllm.train.engine import compact_adamw
from mllm.train.engine.compact_adamw import CompactAdamW, join_bits, round_moments, split_bits
from mllm.train.engine.optim import MasterWeights, check_engine


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 129), nn.Tanh(), nn.Linear(129, 5)).bfloat16()


def _groups(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [
        {
            "params": [p for _, p in chosen],
            "names": [n for n, _ in chosen],
            "lr": 2e-3,
            "base_rate": 2e-3,
            "weight_decay": decay,
        }
        for decay, chosen in ((0.1, named[::2]), (0.0, named[1::2]))
    ]


def _steps(optimizer, model: nn.Module, count: int, *, first: int = 0) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 / (1 + step)
        optimizer.step(torch.tensor(0.7))


def _weights(optimizer) -> list[torch.Tensor]:
    copies = [copy for group in optimizer.param_groups for copy in group["params"]]
    return [optimizer.weights(c) if isinstance(optimizer, CompactAdamW) else c.detach() for c in copies]


def test_bf16_and_low_bits_are_any_float32_number():
    bits = torch.randint(
        -(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1), dtype=torch.int64
    ).int()
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.3e38, -3.3e38, 1.00390625, 1.01171875, -1.00390625])
    weights = torch.cat([bits.view(torch.float32), edges, 1 + torch.arange(-70000, 70000) * 2.0**-23])
    weights = weights[weights.isfinite()]
    parameter, low = torch.empty_like(weights, dtype=torch.bfloat16), torch.empty_like(weights, dtype=torch.int16)
    split_bits(weights, parameter, low)
    assert torch.equal(join_bits(parameter, low).view(torch.int32), weights.view(torch.int32))
    nearest = weights.bfloat16()
    differs = parameter.view(torch.int16) != nearest.view(torch.int16)
    ties = (weights.view(torch.int32) & 0xFFFF) == 0x8000
    assert bool((ties | ~differs).all()) and bool(differs.any())
    finite = differs & parameter.isfinite() & nearest.isfinite()
    distance = (parameter.double() - weights.double()).abs(), (nearest.double() - weights.double()).abs()
    assert torch.equal(distance[0][finite], distance[1][finite])  # a tie: both are equally near


def test_low_bits_are_updated_as_the_float32_copy_bit_for_bit():
    theirs, ours = _model(), _model()
    usual = MasterWeights(_groups(theirs), OptimizerSpec(betas=(0.9, 0.95)))
    compact = CompactAdamW(_groups(ours), OptimizerSpec(betas=(0.9, 0.95), master="low_bits"))
    _steps(usual, theirs, 12)
    _steps(compact, ours, 12)
    for a, b in zip(_weights(usual), _weights(compact), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(usual.state.values(), compact.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("value", [3e-5, -0.7, 1e-20, 255.3])
def test_rounding_keeps_the_mean_and_hits_the_two_neighbours_alone(value):
    size = 1 << 18
    wide = torch.full((size,), value)
    mean, square = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16)
    round_moments(wide, wide, mean, square, key=compact_adamw.key_of("a.weight"), step=3)
    for rounded in (mean, square):
        found = rounded.unique()
        gap = float((found[-1] - found[0]).abs())
        assert len(found) == 2 and float(found[0]) < value < float(found[1])
        # The mean of 262,144 coins has a deviation of at most a thousandth of their gap: five of these.
        assert abs(float(rounded.double().mean()) - value) < 5 * gap / 1024
    up = torch.stack([moment == moment.max() for moment in (mean, square)]).float()
    assert abs(float(torch.corrcoef(up)[0, 1])) < 0.01  # one coin each
    exact = torch.full((64,), 0.5)
    round_moments(exact, exact, mean[:64], square[:64], key=1, step=3)
    assert bool((mean[:64] == 0.5).all())


def test_roundings_differ_by_tensor_and_update_and_are_the_same_in_every_run():
    wide = torch.full((4096,), 1.00390625)  # half way

    def rounded(name: str, step: int) -> torch.Tensor:
        target = torch.empty(4096, dtype=torch.bfloat16)
        round_moments(wide, wide, target, target.clone(), key=compact_adamw.key_of(name), step=step)
        return target

    first = rounded("a", 1)
    assert torch.equal(first, rounded("a", 1))
    for other in (rounded("b", 1), rounded("a", 2)):
        assert 0.4 < float((first != other).float().mean()) < 0.6


def test_bf16_moments_keep_small_increments_that_nearest_rounding_would_lose():
    """The second moment of a constant gradient goes to its square: from bf16 values one rounded to the nearest never gets there."""
    size, beta = 4096, 0.999
    square, lost = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    scratch = torch.zeros(size, dtype=torch.bfloat16)
    for step in range(1, 1501):
        wide = square.float() * beta + (1 - beta)
        round_moments(wide, wide, square, scratch, key=5, step=step)
        lost = (lost.float() * beta + (1 - beta)).bfloat16()
    wanted = 1 - beta**1500
    assert float(square.float().mean()) == pytest.approx(wanted, rel=5e-3)
    assert float(lost) < 0.6 * wanted


@pytest.mark.parametrize(
    "settings", [{"master": "low_bits"}, {"moments": "bfloat16"}, {"master": "low_bits", "moments": "bfloat16"}]
)
def test_the_kernel_is_the_plain_update(settings, monkeypatch):
    """By Triton's interpreter; `benchmarks/train_compact.py` compares them on a GPU."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    name = "mllm.train.engine.fused_adamw_kernel"
    monkeypatch.delitem(sys.modules, name, raising=False)
    kernels = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, kernels)
    try:
        plain, kernel = _model(), _model()
        spec = OptimizerSpec(betas=(0.9, 0.95), **settings)
        reference, ours = CompactAdamW(_groups(plain), spec), CompactAdamW(_groups(kernel), spec)
        ours.fused = True
        _steps(reference, plain, 4)
        _steps(ours, kernel, 4)
        for a, b in zip(_weights(reference), _weights(ours), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8)
        for a, b in zip(reference.state.values(), ours.state.values(), strict=True):
            assert torch.equal(a["step"], b["step"])
            for key in ("exp_avg", "exp_avg_sq"):
                if "moments" not in settings:
                    torch.testing.assert_close(b[key], a[key], rtol=1e-6, atol=1e-7)  # a last bit of the terms
                else:  # a last bit of float32 decides a coin now and then
                    assert float((a[key] != b[key]).float().mean()) < 1e-3
        if "master" in settings:
            for p in kernel.parameters():
                assert bool((p.float() - join_bits(p, ours.low[id(p)])).abs().le(p.float().abs() / 256).all())
    finally:
        sys.modules.pop(name, None)


def test_what_the_options_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="type adamw, and type is muon"):
        validate(OptimizerSpec, {"type": "muon", "moments": "bfloat16"}, where="optimizer")
    with pytest.raises(ConfigError, match="ema averages float32 copies"):
        validate(OptimizerSpec, {"master": "low_bits", "ema": 0.99}, where="optimizer")
    with pytest.raises(ConfigError, match="engine: none, sharded or fsdp2; ZeRO cuts"):
        check_engine(OptimizerSpec(moments="bfloat16"), "sft", 2)
    with pytest.raises(ConfigError, match="set dtype: bfloat16"):
        CompactAdamW(_groups(_model().float()), OptimizerSpec(master="low_bits"))
