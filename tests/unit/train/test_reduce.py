"""Are gradients summed over processes as one process would have them, also those that only some processes have?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from mllm.heads.base import Head, HeadConfig, HeadParts
from mllm.heads.running_norm import RunningNorm, share_statistics
from mllm.train.engine.reduce import OverlappedSum
from mllm.train.engine.shards import buckets_of


class _Forked(nn.Module):
    """Three parts; a sample asks for one of the first two, nobody for the third."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
        self.head = nn.Linear(3, 1)

    def forward(self, x, part):
        return self.head(torch.tanh(self.parts[part](x))).square().sum()


class _Normed(Head):
    """A head that norms the states it is given."""

    def __init__(self):
        super().__init__(HeadConfig(type="normed"), HeadParts(5))
        self.norm = RunningNorm(5)


def _states(process: int) -> torch.Tensor:
    return _sample(9, process) + 3 * process


def _sample(micro: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * micro + rank))


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = _Forked()
    learning = list(model.parameters())
    reduction = OverlappedSum(learning, alone_elements=4)  # weights by themselves, biases together
    for step in range(2):
        for parameter in learning:
            parameter.grad = None
        for micro in range(2):
            if micro == 1:
                reduction.start()
            # Rank 0 uses the first part, rank 1 the second one; a loss of two forward passes in the last micro-batch.
            loss = model(_sample(4 * step + micro, rank), rank) + micro * model(_sample(4 * step + 2, rank), rank)
            loss.backward()
        reduction.finish()
        torch.save([p.grad.clone() for p in learning], f"{folder}/gradients-{step}-{rank}.pt")
    reduction.close()
    half = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    reduction = OverlappedSum([half], alone_elements=1)
    half.grad = torch.randn(64, generator=torch.Generator().manual_seed(rank)).bfloat16()
    reduction.finish()
    torch.save(half.grad, f"{folder}/half-{rank}.pt")
    model = nn.Module()
    model.heads = nn.ModuleDict({"a": _Normed(), "b": _Normed()})
    model.heads["a"].norm(_states(rank))
    if rank == 1:  # process 0 has nothing to teach the other head
        model.heads["b"].norm(_states(1))
    share_statistics(model)
    torch.save(model.state_dict(), f"{folder}/normed-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_different_parts_equal_one(tmp_path: Path):
    torch.multiprocessing.spawn(_work, args=(str(tmp_path),), nprocs=2)
    for step in range(2):
        model = _Forked()
        for rank in range(2):
            for micro in range(2):
                part = model(_sample(4 * step + micro, rank), rank)
                (part + micro * model(_sample(4 * step + 2, rank), rank)).backward()
        found = [torch.load(tmp_path / f"gradients-{step}-{rank}.pt") for rank in range(2)]
        for (name, parameter), first, second in zip(model.named_parameters(), *found, strict=True):
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert torch.equal(first, second), name
            assert (first - wanted).abs().max() < 1e-5, name
            assert parameter.grad is not None or name.startswith("parts.2")
    halves = [torch.randn(64, generator=torch.Generator().manual_seed(rank)).bfloat16() for rank in range(2)]
    once = (halves[0].float() + halves[1].float()).bfloat16()  # two bf16 gradients: as in fp32, rounded once
    assert all(torch.equal(torch.load(tmp_path / f"half-{rank}.pt"), once) for rank in range(2))
    normed = [torch.load(tmp_path / f"normed-{rank}.pt") for rank in range(2)]
    for name, states in (("a", torch.cat([_states(0), _states(1)])), ("b", _states(1))):
        for found in normed:
            torch.testing.assert_close(found[f"heads.{name}.norm.mean"], states.mean(0))
            torch.testing.assert_close(found[f"heads.{name}.norm.variance"], states.var(0, correction=0))
            assert found[f"heads.{name}.norm.batches"] == 1


@pytest.mark.parametrize("alone", [1, 20, 10**6])
def test_buckets_hold_every_parameter_once_large_ones_alone_and_last_ones_first(alone):
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 40, 5, 70)]
    buckets = buckets_of(parameters, alone)
    sizes = [[p.numel() for p in bucket] for bucket in buckets]
    assert sizes == {1: [[70], [5], [40], [3]], 20: [[70], [40], [5, 3]], 10**6: [[70, 5, 40, 3]]}[alone]


def test_two_types_share_no_copy():
    parameters = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.bfloat16)]
    assert [len(bucket) for bucket in buckets_of(parameters, 10)] == [2, 1]
