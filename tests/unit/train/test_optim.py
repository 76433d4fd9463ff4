"""Do optimizers and schedules compute what their definitions say?"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mllm.errors import ConfigError, UnavailableError
from mllm.recipe import OptimizerSpec, ScheduleSpec
from mllm.train.engine import fused_adamw
from mllm.train.engine.fused_adamw import reference_update
from mllm.train.engine.groups import Group
from mllm.train.engine.optim import MasterWeights, build_optimizer, check_engine, orthogonalise
from mllm.train.engine.schedule import rate_factor, warmup_steps


def _groups(model: nn.Module, rate: float = 1e-2, decay: float = 0.1) -> list[Group]:
    names = [n for n, _ in model.named_parameters()]
    return [
        Group("connector", rate, decay, tuple(n for n in names if n.endswith("weight")), 0),
        Group("connector", rate, 0.0, tuple(n for n in names if n.endswith("bias")), 0),
    ]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def _train(model: nn.Module, optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
        for p in model.parameters():
            p.grad = None


def test_adamw_equals_torch_adamw_with_the_same_groups():
    ours, theirs = _model(), _model()
    _train(ours, build_optimizer(ours, _groups(ours), OptimizerSpec(betas=(0.9, 0.95))))
    parameters = dict(theirs.named_parameters())
    _train(
        theirs,
        torch.optim.AdamW(
            [{"params": [parameters[n] for n in g.names], "weight_decay": g.weight_decay} for g in _groups(theirs)],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    )
    for a, b in zip(
        ours.parameters(), theirs.parameters()
    ):  # fused and plain: some processors round a vector's root otherwise
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_master_weights_learn_from_updates_that_bf16_would_swallow(kind):
    rate, spec = 1e-6, OptimizerSpec(type=kind)
    model = _model().bfloat16()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, _groups(model, rate, 0.0), spec, master=True)
    assert isinstance(optimizer, MasterWeights)
    reference = _model().bfloat16().float()
    plain = build_optimizer(reference, _groups(reference, rate, 0.0), spec)
    for _ in range(3):
        for p, r in zip(model.parameters(), reference.parameters()):
            p.grad = torch.ones_like(p)
            r.grad = torch.ones_like(r)
        optimizer.step()
        plain.step()
    copies = dict(zip(map(id, optimizer.parameters), optimizer.masters))
    for wanted, p, before in zip(reference.parameters(), model.parameters(), start):
        copy = copies[id(p)]
        # three steps move a weight by 3e-6: the tolerance is a tenth of one step
        torch.testing.assert_close(copy, wanted, rtol=0, atol=1e-7)
        assert not torch.equal(copy, before.float())
        assert torch.equal(p, copy.bfloat16())


def test_master_weights_apply_the_clip_factor_to_the_gradient():
    spec = OptimizerSpec(type="sgd", betas=(0.0, 0.9))
    model = _model().bfloat16()
    before = {id(p): p.detach().float() for p in model.parameters()}
    optimizer = build_optimizer(model, _groups(model, 1.0, 0.0), spec, master=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(torch.tensor(0.25))
    for copy, parameter in zip(optimizer.masters, optimizer.parameters):
        old = before[id(parameter)]
        assert torch.allclose(old - copy, torch.full_like(old, 0.25))


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (40, 10)])
def test_muon_makes_singular_values_equal(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5 and values.max() < 1.3, values


def test_muon_updates_matrices_and_leaves_vectors_to_adamw():
    model = _model()
    optimizer = build_optimizer(model, _groups(model), OptimizerSpec(type="muon"))
    by_kind = {group["use_muon"]: group["names"] for group in optimizer.param_groups}
    assert by_kind == {True: ["0.weight", "2.weight"], False: ["0.bias", "2.bias"]}
    before = model[0].weight.detach().clone()
    _train(model, optimizer, steps=1)
    update = (before * (1 - 1e-2 * 0.1) - model[0].weight) / 1e-2
    values = torch.linalg.svdvals(update) / (0.2 * math.sqrt(9))
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_reduces_the_loss():
    model = _model()
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
    optimizer = build_optimizer(model, _groups(model, 3e-2, 0.0), OptimizerSpec(type="muon"))
    before = model(data).square().mean().item()
    _train(model, optimizer, steps=30)
    assert model(data).square().mean().item() < 0.2 * before


def test_optimizers_that_zero_would_break_are_refused():
    with pytest.raises(ConfigError, match="does not work on ZeRO"):
        check_engine(OptimizerSpec(type="muon"), "sft", 2)
    check_engine(OptimizerSpec(type="muon"), "sft", 0)
    check_engine(OptimizerSpec(type="adamw"), "sft", 3)


def test_a_missing_bitsandbytes_says_what_to_install():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        model = _model()
        with pytest.raises(UnavailableError, match="pip install bitsandbytes"):
            build_optimizer(model, _groups(model), OptimizerSpec(type="adamw_8bit"))


def test_schedules_warm_up_and_end_where_they_should():
    spec = ScheduleSpec(type="cosine", warmup=0.1, minimum=0.1)
    assert warmup_steps(spec, 100) == 10
    factors = [rate_factor(spec, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate_factor(spec, 100, 100) == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    linear = ScheduleSpec(type="linear", warmup=4)
    assert [rate_factor(linear, s, 8) for s in (0, 3, 4, 6)] == [0.25, 1.0, 1.0, 0.5]
    assert rate_factor(ScheduleSpec(type="constant", warmup=0), 5, 8) == 1.0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_the_fused_kernels_reference_is_torchs_adamw_over_a_hundred_clipped_steps(kind):
    """In fp32 to 1e-6, low-precision weights exactly the rounded copies; rates change from step to step."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(40, 30, generator=generator).to(kind)
    master, wanted = parameter.float(), nn.Parameter(parameter.float())
    mean, square = torch.zeros_like(master), torch.zeros_like(master)
    theirs = torch.optim.AdamW([wanted], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 101):
        gradient = (torch.randn(40, 30, generator=generator) * 10.0 ** (step % 5 - 3)).to(kind)
        scale, rate = torch.tensor(1.0 / (1 + step % 3)), 1e-3 * (1 + step % 7)
        wanted.grad, theirs.param_groups[0]["lr"] = gradient.float() * scale, rate
        theirs.step()
        numbers = {"rate": rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": step}
        reference_update(parameter, gradient, master, mean, square, scale=scale, **numbers)
    assert (master - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert torch.equal(parameter, master.to(kind))
    state = theirs.state[wanted]
    for ours, key in ((mean, "exp_avg"), (square, "exp_avg_sq")):
        assert (ours - state[key]).abs().max() <= 1e-6 * state[key].abs().max()


def test_large_tensors_take_the_fused_road_and_small_ones_torchs(monkeypatch):
    """The kernel itself needs CUDA; here its reference stands in its place and everything around it is real: states,
    counts after loading, groups, freed gradients."""
    monkeypatch.setattr(fused_adamw, "SMALLEST", 20)
    monkeypatch.setattr(fused_adamw, "fused_update", reference_update)
    monkeypatch.setattr("mllm.train.engine.optim.available", lambda device: True)
    spec = OptimizerSpec(betas=(0.9, 0.95))
    ours, theirs = _model().bfloat16(), _model().bfloat16()
    fused = build_optimizer(ours, _groups(ours), spec, master=True)
    assert fused.fused is not None and len(fused.fused.small) == 2 and len(fused.fused.large) == 2
    plain = build_optimizer(theirs, _groups(theirs), spec.model_copy(update={"fused": False}), master=True)
    assert plain.fused is None
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        if step == 4:  # as after a checkpoint was read
            fused.restore_parameters()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            a.grad = torch.randn(a.shape, generator=generator).bfloat16()
            b.grad = a.grad.clone()
        for optimizer in (fused, plain):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step(torch.tensor(0.5))
        assert all(p.grad is None for p in ours.parameters())
    for a, b in zip(fused.masters, plain.masters):
        assert (a - b).abs().max() < 1e-6
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.allclose(fused.state[a][key], plain.state[b][key], rtol=1e-5, atol=1e-9)


def test_a_fused_update_that_cannot_be_is_refused():
    model = _model().bfloat16()
    with pytest.raises(ConfigError, match=r"optimizer\.fused"):
        build_optimizer(model, _groups(model), OptimizerSpec(fused=True), master=True)
