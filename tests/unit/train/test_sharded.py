"""Do processes that share the optimizer's state train as one that has all of it? (Whole runs, and resuming from one engine's checkpoint in
another: tests/integration/test_train_engines.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from mllm.errors import ConfigError
from mllm.recipe import StageSpec
from mllm.train.engine.base import Engine, choose_engine
from mllm.train.engine.build import build_engine
from mllm.train.engine.groups import Group
from mllm.train.engine.sharded import ShardedEngine
from mllm.train.engine.shards import Share
from mllm.train.launch import PRELOADED

STEPS, MICRO, WORLDS = 4, 2, (2, 3)
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "sgd": {"dtype": "float32", "optimizer": {"type": "sgd", "max_grad_norm": 0.5}},
    "ema": {"dtype": "float32", "optimizer": {"ema": 0.5}},
    "bf16": {"dtype": "bfloat16"},
    "bf16, ema": {"dtype": "bfloat16", "optimizer": {"ema": 0.5}},
    "compact": {"dtype": "bfloat16", "optimizer": {"master": "low_bits", "moments": "bfloat16"}},
}


class _Forked(nn.Module):
    """Parts of odd and even sizes; a process asks for one of the first two, nobody for the third. One weight is
    used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))
        self.convolution = nn.Conv2d(2, 6, 2)
        self.tied, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def part_of(self, name: str) -> str:
        return name.partition(".")[0]

    def forward(self, x, part):
        states = torch.tanh(self.parts[part](x)) + self.convolution(x.view(-1, 2, 2, 3)).mean((2, 3))
        return self.head(self.tied(torch.tanh(self.tied(states)))).square().sum()


def _sample(step: int, micro: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def _stage(name: str, engine: str = "sharded") -> StageSpec:
    settings = {"optimizer": {}, **SETTINGS[name]}
    settings["optimizer"] = {"eps": 1e-5, **settings["optimizer"]}
    return StageSpec.model_validate(
        {"name": "sft", "learn": {"connector": 1e-2}, "data": "x", "steps": 1, "engine": engine, **settings}
    )


def _engine(name: str, engine: str = "sharded") -> Engine:
    stage = _stage(name, engine)
    model = _Forked().to(torch.float32 if stage.dtype == "float32" else torch.bfloat16)
    names = [n for n, _ in model.named_parameters()]
    groups = [
        Group("connector", 1e-2, 0.1, tuple(n for n in names if n.endswith("weight")), 0),
        Group("connector", 1e-2, 0.0, tuple(n for n in names if n.endswith("bias")), 0),
    ]
    return build_engine(model, groups, stage, torch.device("cpu"))


def _backward(engine: Engine, step: int, ranks: range, *, factor: float = 1.0) -> None:
    """factor: of the first process's samples."""
    dtype = next(engine.model.parameters()).dtype
    for micro in range(MICRO):
        for rank in ranks:
            x = _sample(step, micro, rank) * (1.0 if rank else factor)
            loss = engine(x=x.to(dtype), part=rank % 2)
            engine.backward(loss, last=micro == MICRO - 1 and rank == ranks[-1])


def _train(engine: Engine, ranks: range) -> dict[str, Any]:
    norms = []
    for step in range(STEPS):
        engine.set_rate_factor(1 / (1 + step))
        _backward(engine, step, ranks)
        norms.append((engine.step(), dict(engine.norms)))
    last = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    with engine.averaged():
        averaged = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    again = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    state = [
        (
            f.name,
            f.start,
            f.flat[f.offset : f.offset + f.length].clone(),
            {k: torch.as_tensor(v) for k, v in f.state.items()},
        )
        for f in engine.fragments()
    ]
    _backward(engine, 0, ranks, factor=float("nan"))  # nothing is learned of it, on any process
    assert not torch.isfinite(torch.tensor(engine.step()))
    kept = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    engine.finish()
    finished = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    return {
        "norms": norms,
        "last": last,
        "averaged": averaged,
        "again": again,
        "state": state,
        "kept": kept,
        "finished": finished,
    }


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank < world:
            _as_one_of(world, rank, folder)


def _as_one_of(world: int, rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    ShardedEngine.alone_elements = 36
    for name in SETTINGS:
        engine = _engine(name)
        assert (
            type(engine) is ShardedEngine
            and any(s.alone for s in engine.shares)
            and not all(s.alone for s in engine.shares)
        )
        torch.save(_train(engine, range(rank, rank + 1)), f"{folder}/{world}-{name}-{rank}.pt")
        engine.close()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What processes of all `WORLDS` found."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED])  # type: ignore[attr-defined]
    start: Any = torch.multiprocessing.start_processes  # type: ignore[attr-defined]
    start(_work, args=(str(folder),), nprocs=max(WORLDS), start_method="forkserver")
    return folder


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", list(SETTINGS))
def test_processes_that_share_the_state_train_as_one_that_has_all(folder, world, name):
    """fp32 weights to 1.2e-7, bf16's to a few of its steps: three gradients of bf16 are rounded in another order."""
    wanted = _train(_engine(name, "none"), range(world))
    found = [torch.load(folder / f"{world}-{name}-{rank}.pt") for rank in range(world)]
    exact = SETTINGS[name]["dtype"] == "float32"
    for one in found:
        for (norm, parts), (other, own) in zip(wanted["norms"], one["norms"], strict=True):
            assert other == pytest.approx(norm, rel=1e-5 if exact else 3e-2)
            assert own == pytest.approx(parts, rel=1e-5 if exact else 5e-2, abs=1e-6)
        for key in ("last", "averaged", "again", "kept", "finished"):
            for weight, tensor in wanted[key].items():
                assert torch.equal(found[0][key][weight], one[key][weight]), (key, weight)
                gap = (tensor.float() - one[key][weight].float()).abs().max()
                assert gap <= (1.2e-7 if exact else 1e-2), (key, weight, float(gap))
    ours = found[0]
    assert all(
        torch.equal(ours["last"][n], ours["again"][n]) and torch.equal(ours["last"][n], ours["kept"][n])
        for n in ours["last"]
    )
    moved = any(not torch.equal(ours["last"][n], ours["averaged"][n]) for n in ours["last"])
    assert moved is ("ema" in name)
    assert not torch.equal(ours["last"]["head.weight"], _Forked().to(ours["last"]["head.weight"].dtype).head.weight)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["fp32", "bf16, ema", "compact"])
def test_every_element_of_every_state_is_one_process_s(folder, world, name):
    wanted = {name: (flat, state) for name, _, flat, state in _train(_engine(name, "none"), range(world))["state"]}
    pieces = [piece for rank in range(world) for piece in torch.load(folder / f"{world}-{name}-{rank}.pt")["state"]]
    exact = SETTINGS[name]["dtype"] == "float32"
    for weight, (flat, state) in wanted.items():
        own = sorted((piece for piece in pieces if piece[0] == weight), key=lambda piece: piece[1])
        assert [start for _, start, _, _ in own] == [sum(len(p[2]) for p in own[:k]) for k in range(len(own))]
        joined = torch.cat([piece for _, _, piece, _ in own])
        assert len(joined) == len(flat) and (joined - flat).abs().max() < (1.2e-7 if exact else 1e-2)
        assert set(own[0][3]) == set(state)
        for key, value in state.items():
            parts = [part[3][key] for part in own]
            if value.dim():
                gap = (torch.cat(parts).float() - value.flatten().float()).abs().max()
                assert gap <= (1e-6 if exact else 0.05) * max(1.0, float(value.abs().max())), (weight, key)
            else:
                assert all(torch.equal(part, value) for part in parts)


def test_one_process_has_the_engine_without_sharing():
    sharded, none = _engine("bf16"), _engine("bf16", "none")
    assert type(sharded) is Engine
    a, b = _train(sharded, range(1)), _train(none, range(1))
    assert a["norms"] == b["norms"] and all(torch.equal(a["last"][n], b["last"][n]) for n in a["last"])


def test_runs_of_a_bucket_cover_it_and_are_views_where_they_can_be():
    parameters = [nn.Parameter(torch.arange(float(n))) for n in (5, 1, 7)]
    for world in (1, 2, 3, 5, 16):
        shares = [Share(parameters, rank, world) for rank in range(world)]
        assert len({share.length for share in shares}) == 1 and not any(share.alone for share in shares)
        for parameter in parameters:
            pieces = [piece for share in shares for piece in share.pieces if piece.parameter is parameter]
            assert torch.equal(torch.cat([piece.weights for piece in pieces]), parameter)
            assert [p.start for p in pieces] == [sum(q.length for q in pieces[:k]) for k in range(len(pieces))]
    even = nn.Parameter(torch.zeros(4, 3))
    halves = [Share([even], rank, 2) for rank in range(2)]
    with torch.no_grad():
        halves[1].pieces[0].weights.add_(1)
    assert all(half.alone for half in halves) and even.sum() == 6 and bool((even[2:] == 1).all())


@pytest.mark.parametrize("kind", ["muon", "adamw_8bit"])
def test_optimizers_of_whole_matrices_or_blocks_are_refused(kind):
    stage = _stage("fp32").model_copy(update={"optimizer": _stage("fp32").optimizer.model_copy(update={"type": kind})})
    with pytest.raises(ConfigError, match=rf"stages\.sft\.optimizer\.type '{kind}' updates whole.*use engine: none"):
        choose_engine(stage)
