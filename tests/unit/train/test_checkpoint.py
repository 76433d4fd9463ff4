"""Is a checkpoint complete or absent, and exact?"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mllm.errors import CheckpointError
from mllm.recipe import Recipe, StageSpec
from mllm.train.checkpoint import copies
from mllm.train.checkpoint.export import save_stage
from mllm.train.checkpoint.resume import Progress, fingerprint, latest_checkpoint
from mllm.train.checkpoint.write import CheckpointWriter, save_checkpoint
from mllm.train.engine.base import Engine
from mllm.train.engine.groups import Group


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.first, self.norm, self.second = (
            nn.Linear(5, 6),
            nn.Linear(6, 7),
            nn.BatchNorm1d(7),
            nn.Linear(7, 2),
        )
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.dropout(self.norm(self.first(self.frozen(x))), 0.2, self.training))


class Exported(Net):
    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")


COMPACT = {
    "low_bits": {"master": "low_bits"},
    "moments": {"moments": "bfloat16"},
    "both": {"master": "low_bits", "moments": "bfloat16"},
}


def _engine(dtype: str = "float32", optimizer: str = "adamw", model: nn.Module | None = None) -> Engine:
    model = model or Net()
    if dtype == "bfloat16":
        model.bfloat16()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    groups = [Group("connector", 1e-2, 0.1, tuple(names[::2]), 0), Group("connector", 1e-3, 0.0, tuple(names[1::2]), 0)]
    stage = StageSpec(
        name="s",
        learn={"connector": 1e-3},
        data="x",
        steps=9,
        dtype=dtype,
        optimizer=COMPACT.get(optimizer, {"type": optimizer}),
    )
    return Engine(model, groups, stage, torch.device("cpu"))


def _steps(engine: Engine, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        x = torch.randn(8, 5).to(engine.learning[0].dtype)
        loss = engine.model(x).float().square().mean()
        engine.backward(loss, last=True)
        engine.step()
        losses.append(loss.item())
    return losses


def _progress(**changes) -> Progress:
    return Progress(stage="s", step=3, samples=24, total_steps=9, signature="{}", **changes)


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        *[(dtype, kind) for dtype in ("float32", "bfloat16") for kind in ("adamw", "sgd", "muon")],
        *[("bfloat16", kind) for kind in COMPACT],
    ],
)
def test_training_goes_on_bit_equal_with_dropout_buffers_and_optimizer_state(tmp_path, dtype, optimizer):
    engine = _engine(dtype, optimizer)
    torch.manual_seed(7)
    _steps(engine, 3)
    path = save_checkpoint(tmp_path, engine, _progress(frozen=fingerprint(engine.model)))
    wanted = _steps(engine, 4)
    torch.manual_seed(99)
    reader = latest_checkpoint(tmp_path)
    assert reader is not None and reader.path == path and reader.progress.step == 3
    model = _engine(dtype, optimizer).model
    reader.check(model, _progress(frozen=fingerprint(model)))
    reader.restore_weights(model)
    again = _engine(dtype, optimizer, model)
    reader.restore_engine(again)
    assert reader.restore_random(again)
    assert _steps(again, 4) == wanted
    for a, b in zip(engine.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)
    assert not [p for p in path.iterdir() if p.suffix not in (".safetensors", ".json")]


@pytest.mark.parametrize(
    ("before", "after"),
    [("adamw", "both"), ("both", "adamw"), ("adamw", "low_bits"), ("low_bits", "moments"), ("moments", "low_bits")],
)
def test_a_run_goes_on_with_its_state_kept_in_another_way(tmp_path, before, after):
    """Weights are the same float32 numbers; float32 moments become the nearest bf16 ones, and bf16 ones the same float32 numbers."""
    engine = _engine("bfloat16", before)
    _steps(engine, 3)
    save_checkpoint(tmp_path, engine, _progress())
    reader = latest_checkpoint(tmp_path)
    assert reader is not None
    model = _engine("bfloat16", after).model
    reader.restore_weights(model)
    again = _engine("bfloat16", after, model)
    reader.restore_engine(again)
    narrow = "moments" in COMPACT.get(after, {})
    old = {f.name: f for f in engine.fragments()}
    new = {f.name: f for f in again.fragments()}
    assert old.keys() == new.keys()
    for name, fragment in new.items():
        assert fragment.flat.dtype == torch.float32 and torch.equal(fragment.flat, old[name].flat)
        for key in ("exp_avg", "exp_avg_sq"):
            value = fragment.state[key]
            assert value.dtype == (torch.bfloat16 if narrow else torch.float32)
            assert torch.equal(value, old[name].state[key].to(value.dtype)) and bool(value.any())
        assert float(fragment.state["step"]) == 3
    _steps(again, 1)
    assert {float(f.state["step"]) for f in again.fragments()} == {4.0}


def test_only_the_newest_two_are_kept_and_remains_of_a_killed_write_are_removed(tmp_path):
    engine = _engine()
    for step in (1, 2, 3):
        _steps(engine, 1)
        save_checkpoint(tmp_path, engine, Progress(stage="s", step=step))
    (tmp_path / ".writing-step-00000004").mkdir()
    (tmp_path / ".deleting-step-00000001").mkdir()
    reader = latest_checkpoint(tmp_path)
    assert reader is not None and reader.path.name == "step-00000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_never_picked_up(tmp_path, damage):
    engine = _engine()
    for step in (1, 2):
        _steps(engine, 1)
        save_checkpoint(tmp_path, engine, Progress(stage="s", step=step))
    newest = tmp_path / "step-00000002"
    file = next(newest.glob("state-*.safetensors"))
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "manifest.json").unlink()
    reader = latest_checkpoint(tmp_path)
    assert reader is not None and reader.path.name == "step-00000001"
    assert len(reader.passed_over) == 1 and reader.passed_over[0].startswith("step-00000002")
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="no earlier checkpoint is complete"):
        latest_checkpoint(tmp_path)


def test_a_full_disk_at_the_first_save_promises_no_earlier_checkpoint(tmp_path):
    engine = _engine(model=Exported())
    folder, limits = tmp_path / "checkpoints" / "s", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write the checkpoint.*has no earlier one") as first:
            save_checkpoint(folder, engine, Progress(stage="s", step=1))
        with pytest.raises(CheckpointError, match=r"could not be written.*has no checkpoint, so --resume") as last:
            save_stage(engine, engine.model, Recipe.model_construct(), engine.stage, tmp_path / "s", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "intact" not in f"{first.value} {last.value}" and not (tmp_path / "s").exists()


def test_a_full_disk_is_told_and_leaves_the_previous_checkpoint_intact(tmp_path):
    engine = _engine()
    _steps(engine, 1)
    save_checkpoint(tmp_path, engine, Progress(stage="s", step=1))
    _steps(engine, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write the checkpoint.*step-00000001.*--resume"):
            save_checkpoint(tmp_path, engine, Progress(stage="s", step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reader = latest_checkpoint(tmp_path)
    assert reader is not None and reader.progress.step == 1 and not reader.passed_over
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_another_architecture_other_settings_and_other_frozen_weights_are_refused(tmp_path):
    engine = _engine()
    _steps(engine, 1)
    signature = json.dumps({"seed": 0})
    save_checkpoint(
        tmp_path, engine, Progress(stage="s", step=1, signature=signature, frozen=fingerprint(engine.model))
    )
    reader = latest_checkpoint(tmp_path)
    assert reader is not None
    now = {"stage": "s", "signature": signature, "frozen": fingerprint(engine.model)}
    reader.check(engine.model, Progress(**now))
    with pytest.raises(CheckpointError, match="seed: 0 then, 1 now"):
        reader.check(engine.model, Progress(**{**now, "signature": json.dumps({"seed": 1})}))
    other = Net()
    other.second = nn.Linear(7, 3)
    with pytest.raises(CheckpointError, match=r"another architecture: second\.bias has 2 elements there and 3 here"):
        reader.check(other, Progress(**now))
    with torch.no_grad():
        engine.model.frozen.weight[0, 0] += 1e-6  # type: ignore[union-attr, operator]
    with pytest.raises(CheckpointError, match="do not learn"):
        reader.check(engine.model, Progress(**{**now, "frozen": fingerprint(engine.model)}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_of_weights_survives_a_resume_and_is_what_a_stage_ends_with(tmp_path, dtype):
    def start() -> Engine:
        engine = _engine(dtype)
        engine.stage.optimizer.ema = 0.8
        return engine

    torch.manual_seed(4)
    whole = start()
    by_hand: list[list[torch.Tensor]] = []
    for _ in range(6):
        _steps(whole, 1)
        weights = [p.detach().clone() for group in whole.optimizer.param_groups for p in group["params"]]
        last = by_hand[-1] if by_hand else weights
        by_hand.append([a.lerp(w, 1 - 0.8) for a, w in zip(last, weights)])
    torch.manual_seed(4)
    first = start()
    _steps(first, 3)
    save_checkpoint(tmp_path, first, _progress())
    second, reader = start(), latest_checkpoint(tmp_path)
    assert reader is not None
    reader.restore_weights(second.model)
    reader.restore_engine(second)
    reader.restore_random(second)
    _steps(second, 3)
    for engine in (whole, second):
        engine.finish()
        found = [p for group in engine.optimizer.param_groups for p in group["params"]]
        torch.testing.assert_close(found, by_hand[-1], rtol=1e-6, atol=1e-7)
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b.to(a.dtype)) for a, b in zip(whole.learning, weights)), "not the last weights"


def test_eight_bit_optimizer_state_goes_on_bit_equal(tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = lambda: nn.Sequential(nn.Linear(5, 90), nn.Linear(90, 90), nn.Linear(90, 2))  # noqa: E731

    def start() -> Engine:
        torch.manual_seed(0)
        return _engine("float32", "adamw_8bit", wide())

    engine = start()
    _steps(engine, 3)
    kinds = {v.dtype for s in engine.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    assert torch.uint8 in kinds
    save_checkpoint(tmp_path, engine, _progress())
    wanted = _steps(engine, 3)
    again, reader = start(), latest_checkpoint(tmp_path)
    assert reader is not None
    reader.restore_weights(again.model)
    reader.restore_engine(again)
    reader.restore_random(again)
    assert _steps(again, 3) == wanted


def test_written_in_the_background_it_holds_the_moment_it_was_begun_at(tmp_path):
    engine, writer = _engine(), CheckpointWriter(tmp_path, background=True)
    torch.manual_seed(7)
    _steps(engine, 2)
    path = writer.save(engine, _progress(frozen=fingerprint(engine.model)))
    wanted = _steps(engine, 4)  # while it is written, and before it is closed
    assert not path.exists() and latest_checkpoint(tmp_path / "elsewhere") is None
    writer.finish()
    assert not writer.done()
    reader = latest_checkpoint(tmp_path)
    assert reader is not None and reader.path == path
    again = _engine()
    reader.restore_weights(again.model)
    reader.restore_engine(again)
    assert reader.restore_random(again) and _steps(again, 4) == wanted


def test_copies_lie_in_memory_that_is_kept_and_hold_what_was_copied(tmp_path, monkeypatch, caplog):
    """The same places as page-locked memory has, here of plain memory: bit for bit, apart, and used again."""
    monkeypatch.setattr(copies, "_CHUNK", 4096)
    asked = []

    def allocate(size: int) -> torch.Tensor:
        if len(asked) == 4:
            raise RuntimeError("CUDA error: out of memory")
        asked.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    kept = copies.HostCopies(torch.device("cpu"), allocate)
    rows = [
        torch.randn(7, 5).t(),
        torch.arange(9, dtype=torch.int8),
        torch.randn(300, dtype=torch.bfloat16),
        torch.randn(2000),
    ]
    for _ in range(3):
        kept.begin()
        held = [kept(row) for row in rows]
        kept.wait()
        assert all(
            torch.equal(a, b) and a.is_contiguous() and a.dtype == b.dtype for a, b in zip(held, rows, strict=True)
        )
        save_file(
            {str(k): tensor for k, tensor in enumerate(held)}, tmp_path / "x.safetensors"
        )  # which refuses overlaps
        assert all(torch.equal(v, rows[int(k)]) for k, v in load_file(tmp_path / "x.safetensors").items())
    assert asked == [4096, 8000]
    more = [kept(torch.full((1000,), float(k))) for k in range(4)]
    assert len(asked) == 4 and "no more page-locked memory" in caplog.text
    assert [float(row[999]) for row in more] == [0.0, 1.0, 2.0, 3.0], "what has no place is copied all the same"


def test_a_failed_write_in_the_background_is_told_and_is_no_checkpoint(tmp_path):
    engine, writer = _engine(), CheckpointWriter(tmp_path, background=True)
    for step in (1, 2):  # the second save closes the first
        _steps(engine, 1)
        writer.save(engine, Progress(stage="s", step=step))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    _steps(engine, 1)
    writer.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        writer.save(engine, Progress(stage="s", step=3))
        with pytest.raises(
            CheckpointError, match=r"step-00000003: process 0 could not write.*intact \(step-00000002\)"
        ):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    writer.save(engine, Progress(stage="s", step=4))
    writer.abandon()  # training failed meanwhile: what was written whole is still not closed
    reader = latest_checkpoint(tmp_path)
    assert reader is not None and reader.progress.step == 2 and not reader.passed_over


def test_killed_in_the_middle_of_a_write_in_the_background_the_one_before_is_the_last(tmp_path, monkeypatch):
    engine, writer = _engine(), CheckpointWriter(tmp_path, background=True)
    _steps(engine, 1)
    writer.save(engine, Progress(stage="s", step=1))
    writer.finish()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr("mllm.train.checkpoint.write.sync_file", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        writer.save(engine, Progress(stage="s", step=2))
        writer.finish()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / ".writing-step-00000002").is_dir()
    reader = latest_checkpoint(tmp_path)
    assert reader is not None and reader.progress.step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
