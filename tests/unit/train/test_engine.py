"""Are engines chosen, configured and refused as recipes say? (Several processes:
tests/integration/test_train_engines.py.)"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mllm.distributed import process_group
from mllm.errors import ConfigError, UnavailableError
from mllm.recipe import ModelSpec, StageSpec
from mllm.train.checkpoint.resume import CheckpointReader, Progress
from mllm.train.checkpoint.write import save_checkpoint
from mllm.train.engine.base import Engine, EngineChoice, choose_engine
from mllm.train.engine.groups import Group
from mllm.train.engine.units import layers_to_share


def _stage(**changes) -> StageSpec:
    return StageSpec.model_validate({"name": "sft", "learn": {"connector": 1e-3}, "data": "x", "steps": 1, **changes})


@pytest.mark.parametrize(
    ("name", "stage"), [("none", 0), ("sharded", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3), ("fsdp2", 0)]
)
def test_shipped_engines_are_found(name, stage):
    choice = choose_engine(_stage(engine=name))
    assert choice.zero_stage == stage and (choice.config is None) == (stage == 0)
    assert choice.kind == name and choice.shares_weights == (name in ("zero3", "fsdp2"))


def test_a_json_file_and_an_inline_config_are_engines(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert choose_engine(_stage(engine=str(path))).zero_stage == 2
    assert choose_engine(_stage(engine={"zero_optimization": {"stage": 3}})).zero_stage == 3
    assert choose_engine(_stage(engine="recipes/deepspeed/zero2_offload.json")).config["zero_optimization"][
        "offload_optimizer"
    ]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("zero4", r"stages\.sft\.engine: unknown engine 'zero4', did you mean 'zero[123]'"),
        ("nowhere.json", r"stages\.sft\.engine: no such file"),
        ({"zero_optimization": {"stage": 0}}, "1, 2 or 3 is expected"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "belongs in the stage's own optimizer"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "bf16 or fp32"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}},
            r"offload_optimizer\.device is nvme.*stage is 2: NVMe goes with stage 3; use stage: 3, or device: cpu",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r"offload_param\.nvme_path is missing",
        ),
        (
            {"zero_optimization": {"stage": 3}, "compile": {"deepcompile": True}},
            "DeepCompile.*own compile: true compiles",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}, "'disk'; cpu, nvme or none"),
    ],
)
def test_wrong_engines_are_refused_with_the_path_to_the_key(engine, message):
    with pytest.raises(ConfigError, match=message):
        choose_engine(_stage(engine=engine))


def test_muon_under_zero_is_refused():
    with pytest.raises(ConfigError, match=r"stages\.sft\.optimizer\.type 'muon'"):
        choose_engine(_stage(engine="zero2", optimizer={"type": "muon"}))


@pytest.mark.parametrize("kind", ["muon", "adamw_8bit"])
def test_an_optimizer_that_needs_whole_matrices_is_refused_where_a_process_has_rows(kind):
    with pytest.raises(ConfigError, match=f"'{kind}' updates whole matrices or blocks .* fsdp2 .* use engine: none"):
        choose_engine(_stage(engine="fsdp2", optimizer={"type": kind}))


def test_what_fsdp2_cannot_share_is_refused_by_name():
    class Decoded(nn.Module):
        def __init__(self, decoder: nn.Module):
            super().__init__()
            self.decoder = decoder

        def get_decoder(self) -> nn.Module:
            return self.decoder

    def layer(width: int) -> nn.Module:
        parts = {name: nn.Linear(width, width) for name in "abcd"}
        found = nn.Module()
        for name, part in parts.items():
            found.add_module(name, part)
        return found

    def row(*layers: nn.Module) -> nn.Module:
        found = nn.Module()
        found.layers = nn.ModuleList(layers)
        return found

    assert len(layers_to_share(Decoded(row(layer(2), layer(2))), "sft")[1]) == 2
    with pytest.raises(ConfigError, match=r"stages\.sft\.engine: .* and this stage trains none"):
        layers_to_share(nn.Linear(2, 2), "sft")
    with pytest.raises(ConfigError, match="Linear has no such row; use sharded, zero2 or zero3"):
        layers_to_share(Decoded(nn.Linear(2, 2)), "sft")
    experts = row(row(layer(2), layer(2)), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"layers\.0\.layers\.0 of Module lies within another"):
        layers_to_share(Decoded(experts), "sft")


def _engine(limit: float | None) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    groups = [Group("connector", 1.0, 0.0, ("weight", "bias"), 15)]
    stage = _stage(optimizer={"type": "sgd", "betas": (0.0, 0.9), "max_grad_norm": limit})
    return Engine(model, groups, stage, torch.device("cpu"))


def test_clipping_scales_the_gradient_to_the_limit_and_reports_the_norm_before():
    engine, x = _engine(0.5), torch.randn(6, 4)
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    loss = engine.model(x).square().sum()
    gradient = torch.autograd.grad(loss, list(engine.model.parameters()), retain_graph=True)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    engine.backward(loss, last=True)
    assert engine.step() == pytest.approx(norm.item(), rel=1e-6)
    moved = torch.cat([(before[n] - p).flatten() for n, p in engine.model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_norms_of_parts_are_of_their_own_gradients_and_parts_are_looked_up_once():
    """Looking 300 parameters up took 21 ms of every step, in which a GPU waited for its update."""
    engine, x, asked = _engine(0.5), torch.randn(6, 4), list[str]()
    engine.model.part_of = lambda name: asked.append(name) or f"part of {name}"  # type: ignore[assignment]
    for _ in range(2):
        loss = engine.model(x).square().sum()
        weight, bias = torch.autograd.grad(loss, list(engine.model.parameters()), retain_graph=True)
        engine.backward(loss, last=True)
        engine.step()
        wanted = {"part of weight": weight.norm().item(), "part of bias": bias.norm().item()}
        assert engine.norms == pytest.approx(wanted, rel=1e-6)
    assert asked == ["weight", "bias"]


def test_a_gradient_that_is_not_finite_changes_nothing():
    engine = _engine(None)
    before = [p.detach().clone() for p in engine.model.parameters()]
    engine.backward(engine.model(torch.full((1, 4), float("inf"))).sum(), last=True)
    assert not torch.isfinite(torch.tensor(engine.step()))
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters()))


def test_rates_follow_the_factor_for_every_group():
    engine = _engine(None)
    engine.set_rate_factor(0.25)
    assert engine.rates() == {"connector/no_decay": 0.25}


@pytest.mark.parametrize("what", ["optimizer", "param"])
@pytest.mark.parametrize(("found", "device"), [(False, "nvme"), (True, "nvme"), (False, "cpu")])
def test_nvme_without_its_library_is_one_line_before_anything_is_compiled(monkeypatch, tmp_path, found, device, what):
    from mllm.train.engine.zero import _check_nvme, import_deepspeed

    pytest.importorskip("deepspeed")
    with process_group(always=True):
        import_deepspeed()
        from deepspeed.ops.op_builder import AsyncIOBuilder

        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: found)
        choice = EngineChoice(
            "deepspeed",
            3,
            {"zero_optimization": {"stage": 3, f"offload_{what}": {"device": device, "nvme_path": str(tmp_path)}}},
        )
        if found or device == "cpu":
            _check_nvme(choice, "sft")
        else:
            with pytest.raises(UnavailableError, match=rf"stages\.sft\.engine: offload_{what}.*apt install libaio-dev"):
                _check_nvme(choice, "sft")
        tmp_path.rmdir()
        if device == "nvme":
            with pytest.raises(
                ConfigError, match=rf"offload_{what}\.nvme_path is {tmp_path}; a folder of this machine"
            ):
                _check_nvme(choice, "sft")


def test_a_deepspeed_that_moved_its_slices_is_told_before_training():
    from types import SimpleNamespace

    from mllm.train.engine.deepspeed_private import check_private

    pytest.importorskip("deepspeed")
    weight = torch.zeros(3)
    zero = SimpleNamespace(round_robin_bit16_groups=[[weight]], round_robin_bit16_offsets=[[0]], partition_size=[3])
    with pytest.raises(
        UnavailableError, match=r"single_partition_of_fp32_groups, process_gradients.* is gone.*constraints\.txt"
    ):
        check_private(zero, 2)
    zero.single_partition_of_fp32_groups = [weight]
    zero.process_gradients = zero.independent_gradient_partition_epilogue = zero.is_gradient_accumulation_boundary = (
        print
    )
    zero.partition_gradients = zero.overlap_comm = True
    check_private(zero, 1)
    with pytest.raises(UnavailableError, match="partition_numel, ds_numel"):
        check_private(SimpleNamespace(fp16_groups=[[weight]], fp32_partitioned_groups_flat=[weight]), 3)


def test_a_language_model_starts_in_shares_unless_its_adapters_begin_from_whole_weights():
    from mllm.train.engine.cut import can_be_cut

    model = ModelSpec.model_validate(
        {"language_model": {"source": "x"}, "encoders": {"e": "x"}, "connector": {"type": "mlp"}}
    )
    for adapter, shares in (({"r": 2}, True), ({"r": 2, "use_dora": True}, False)):
        stage = _stage(engine="zero3", learn={"language_model": {"lr": 1e-3, "lora": adapter}})
        assert can_be_cut(model, stage, published=True) is shares
    assert not can_be_cut(model, _stage(engine="zero2"), published=True)


class _Convolved(nn.Module):
    """A convolution whose weights lie with channels last, as an encoder's may, and a matrix used under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.head, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.tanh(self.head(self.first(x).mean((2, 3))))).square().sum()


CONVOLVED = {
    "fp32": {"dtype": "float32"},
    "sgd": {"dtype": "float32", "optimizer": {"type": "sgd"}},
    "bf16": {"dtype": "bfloat16"},
    "compact": {"dtype": "bfloat16", "optimizer": {"master": "low_bits", "moments": "bfloat16"}},
}


def _convolved(kind: str, layout: torch.memory_format) -> Engine:
    stage = _stage(**{"engine": "none", "optimizer": {}, **CONVOLVED[kind]})
    model = _Convolved().to(torch.float32 if stage.dtype == "float32" else torch.bfloat16)
    model.first.to(memory_format=layout)
    names = tuple(name for name, _ in model.named_parameters())
    assert model.first.weight.is_contiguous() is (layout == torch.contiguous_format)
    return Engine(model, [Group("connector", 1e-2, 0.0, names, 0)], stage, torch.device("cpu"))


def _step(engine: Engine, number: int) -> None:
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(number))
    engine.backward(engine(x=x.to(next(engine.model.parameters()).dtype)), last=True)
    engine.step()


@pytest.mark.parametrize("kind", CONVOLVED)
def test_weights_with_channels_last_are_kept_and_gone_on_with(kind, tmp_path):
    """The same steps in either layout; a checkpoint of one goes on in the other, as the run that went on did."""
    last, first = torch.channels_last, torch.contiguous_format
    runs = {}
    for layout in (last, first):
        runs[layout] = _convolved(kind, layout)
        for number in range(2):
            _step(runs[layout], number)
    torch.testing.assert_close(runs[last].state_dict(), runs[first].state_dict(), rtol=1e-2, atol=1e-3)
    saved = {layout: save_checkpoint(tmp_path / str(layout), run, Progress(stage="s")) for layout, run in runs.items()}
    _step(runs[last], 2)
    wanted = runs[last].state_dict()
    for read, into in ((last, last), (last, first)):
        engine = _convolved(kind, into)
        reader = CheckpointReader(saved[read])
        reader.restore_weights(engine.model)
        reader.restore_engine(engine)
        _step(engine, 2)
        exact = {"rtol": 0, "atol": 0} if read == into else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(engine.state_dict(), wanted, **exact)


def test_a_state_that_was_handed_out_is_not_changed_by_the_next_step():
    engine = _convolved("fp32", torch.channels_last)
    state = engine.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    _step(engine, 0)
    assert all(torch.equal(before[name], tensor) and tensor.is_contiguous() for name, tensor in state.items())
    assert not torch.equal(engine.state_dict()["head.weight"], before["head.weight"])
    assert state["head.weight"] is state["again.weight"]
