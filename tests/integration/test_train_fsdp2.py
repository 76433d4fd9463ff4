"""Does `engine: fsdp2` compute what one process does, in any number of processes, and do its checkpoints fit every engine?"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from mllm import distributed
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import StageSpec
from mllm.train.checkpoint.resume import CheckpointReader, Progress, fingerprint
from mllm.train.checkpoint.write import save_checkpoint
from mllm.train.engine.base import Engine
from mllm.train.engine.build import build_engine
from mllm.train.engine.fsdp2 import share_layers
from mllm.train.engine.groups import apply_learning, set_modes
from mllm.train.launch import launch
from mllm.train.prepare import prepare_model

ROWS, LENGTH, STEPS = 6, 12, 2
CASES: dict[str, dict[str, Any]] = {
    "whole": {"learn": {"language_model": 1e-3}, "optimizer": {"eps": 1e-5, "ema": 0.9}},
    "adapter": {
        "learn": {"language_model": {"lr": 1e-3, "lora": {"r": 4}}},
        "gradient_checkpointing": True,
        "optimizer": {"eps": 1e-5, "max_grad_norm": 0.05},
    },
    "compiled": {
        "learn": {"language_model": 1e-3},
        "compile": True,
        "gradient_checkpointing": True,
        "optimizer": {"eps": 1e-5},
    },
    "half": {"learn": {"language_model": 1e-3}, "dtype": "bfloat16", "optimizer": {"eps": 1e-5, "master": "low_bits"}},
}
TOLERANCE = {"half": 1e-4}
"""Of the mean difference of a tensor's weights, which move by 4e-3 and are rounded to bf16; else 2e-7, a few roundings of float32, of the
largest."""


def _stage(case: str, engine: str) -> StageSpec:
    common = {"name": "s", "data": "none", "steps": 1, "dtype": "float32", "gradient_accumulation": 2}
    return StageSpec.model_validate({**common, "engine": engine, **CASES[case]})


def _start(case: str, engine: str, from_: Path | None) -> Engine:
    """Sizes that neither two nor three processes divide evenly, and an embedding that is the head, too."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=49,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=case != "adapter",
    )
    model = MllmForConditionalGeneration(MllmConfig(text_config=text.to_dict()))
    stage, device = _stage(case, engine), torch.device("cpu")
    groups = apply_learning(model, stage)
    set_modes(model)
    prepare_model(model, stage, device=device, zero_stage=0)
    reader = None if from_ is None else CheckpointReader(from_)
    if reader is not None:
        reader.restore_weights(model)
    found = build_engine(model, groups, stage, device)
    if reader is not None:
        reader.restore_engine(found)
    return found


def _train(engine: Engine, first: int) -> list[float]:
    norms = []
    rank, world = distributed.rank(), distributed.world_size()
    for step in range(first, first + STEPS):
        for micro in range(2):
            draw = torch.Generator().manual_seed(10 * step + micro)
            ids = torch.randint(5, 320, (ROWS, LENGTH), generator=draw)[rank::world]
            output = engine(
                input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=2 * ROWS * LENGTH, skip_logits=True
            )
            engine.backward(output.loss, last=micro == 1)
        norms.append(engine.step())
    return norms


def _run(folder: str, kind: str, from_: str | None, engine: str, without: tuple[str, ...] = ()) -> None:
    """Each case: steps, a checkpoint, as many steps again, everything that is to be compared. from_: go on from such a run's
    checkpoint."""
    for case in [case for case in CASES if case not in without]:
        place = Path(folder) / case
        begin = None if from_ is None else next((place / from_).glob("step-*"))
        with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):  # no C++ compiler's time
            found = _start(case, engine, begin)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        frozen = fingerprint(found.model)
        norms = [] if begin is not None else _train(found, 0)
        if begin is None:
            save_checkpoint(place / kind, found, Progress(stage="s", step=STEPS))
        norms += _train(found, STEPS)
        state, parts = {name: value.clone() for name, value in found.state_dict().items()}, found.norms
        if case == "whole":
            with found.averaged():
                state |= {f"average of {name}": value.clone() for name, value in found.state_dict().items()}
        layers = {n: p for n, p in found.model.named_parameters() if ".layers." in n}
        held = sum(getattr(p, "_local_tensor", p).numel() for p in layers.values()) / sum(
            p.numel() for p in layers.values()
        )
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if distributed.is_main():
            kept = {"state": state, "norms": norms, "parts": parts, "held": held, "graphs": graphs, "frozen": frozen}
            torch.save(kept, place / f"{kind}.pt")
        found.close()
        if dist.is_initialized():
            dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fsdp2")
    for case in CASES:
        (path / case).mkdir()
    without = () if os.environ.get("MLLM_NIGHTLY") else ("compiled",)
    _run(str(path), "one", None, "none")
    launch(_run, 3, str(path), "three", None, "fsdp2")
    launch(_run, 2, str(path), "one, then two", "one", "fsdp2", without)
    launch(_run, 2, str(path), "three, then two", "three", "fsdp2")
    _run(str(path), "three, then one", "three", "none", without)
    return path


def _of(folder: Path, case: str, kind: str) -> dict[str, Any]:
    return torch.load(folder / case / f"{kind}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_three_processes_compute_what_one_does_and_hold_a_third_of_the_layers(folder, case):
    wanted, found = _of(folder, case, "one"), _of(folder, case, "three")
    assert set(wanted["state"]) == set(found["state"])
    assert _apart(case, wanted, found) < TOLERANCE.get(case, 2e-7)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5 if case != "half" else 1e-3)
    assert found["parts"] == pytest.approx(wanted["parts"], rel=1e-5 if case != "half" else 1e-3)
    assert found["frozen"] == wanted["frozen"] and found["graphs"] == (case == "compiled")
    assert wanted["held"] == 1 and 0.33 < found["held"] < 0.37


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, marks=[pytest.mark.nightly] if case == "compiled" and way != "three, then two" else [])
        for case in CASES
        for way in ("one, then two", "three, then two", "three, then one")
    ],
)
def test_a_checkpoint_goes_on_under_another_engine_and_number_of_processes(folder, case, way):
    """Weights, moments, averages and counts of updates: each would show in the two steps that follow."""
    assert _apart(case, _of(folder, case, "one"), _of(folder, case, way)) < TOLERANCE.get(case, 2e-7)


def _apart(case: str, wanted: dict[str, Any], found: dict[str, Any]) -> float:
    each = [(wanted["state"][n].float() - found["state"][n].float()).abs() for n in wanted["state"]]
    return max((one.mean() if case == "half" else one.max()).item() for one in each)


class _Layer(nn.Module):
    """Four weights, of which a row's pass uses the first and one other; the last one is there for all layers."""

    def __init__(self, common: nn.Parameter):
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(4))
        self.scale, self.common = nn.Parameter(torch.tensor(1.5)), common

    def forward(self, states: Tensor, other: int) -> Tensor:
        return torch.tanh(self.weights[other](self.weights[0](states)) * self.scale + self.common)


class _Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        common = nn.Parameter(torch.randn(5))
        self.layers = nn.ModuleList(_Layer(common) for _ in range(3))

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, states: Tensor, other: int) -> Tensor:
        for layer in self.layers:
            states = layer(states, other)
        return states


def _states(rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(rank))


def _gradients(folder: str) -> None:
    """Each process uses a weight of its own in every layer; the last one nobody does."""
    model, rank = _Decoder(), distributed.rank()
    share_layers(model, "s", torch.device("cpu"))
    for _ in range(2):  # micro-batches
        model(_states(rank), 1 + rank).square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if isinstance(gradient, DTensor):
            found[name] = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)  # scalars and what layers have in common stay whole
            found[name] = gradient
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.barrier()


def test_layers_whose_weights_only_some_processes_use_are_summed_all_the_same(tmp_path):
    launch(_gradients, 2, str(tmp_path))
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = _Decoder()
    for rank in range(2):
        (2 * model(_states(rank), 1 + rank).square().sum()).backward()
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert set(found) == set(wanted) and {f"layers.{k}.weights.2.weight" for k in range(3)} <= set(found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)
        assert value.any() or ".weights.3." in name
